#!lua
-- Appends items to a stream, and ends it if an end is given. Checks everything before it writes anything.
-- KEYS: the run, its streams, the entries of this stream.
local name, producer, start = ARGV[1], ARGV[2], tonumber(ARGV[3])
local keep_bytes, inputs_bytes = tonumber(ARGV[4]), tonumber(ARGV[5])  -- 0: unlimited
local ending, at, channel, inline_bytes = ARGV[6], ARGV[7], ARGV[8], tonumber(ARGV[9])
local input_cost = tonumber(ARGV[10])
local ITEMS = 11  -- the index of the first item in ARGV

local call = redis.call
local NEXT, FIRST, BYTES, END = 'n:' .. name, 'f:' .. name, 'b:' .. name, 'e:' .. name

local function text(number)
    return string.format('%d', number)
end

local run = call('HMGET', KEYS[1], 'version', 'end', 'inputs')
if not run[1] then
    return {'missing'}
end
local counter = 'p:' .. name .. '\0' .. producer
local stream = call('HMGET', KEYS[2], NEXT, FIRST, BYTES, END, counter)
local following, first, bytes = tonumber(stream[1] or 0), tonumber(stream[2] or 0), tonumber(stream[3] or 0)
local ended = stream[4] or run[2]

local given, from = #ARGV - ITEMS + 1, ITEMS
local expected, last = 0, following - 1
if producer ~= '' then
    last = -1
    if stream[5] then
        local counted, at_seq = string.match(stream[5], '^(%d+) (-?%d+)$')
        expected, last = tonumber(counted), tonumber(at_seq)
    end
    if start > expected then
        return {'hole', text(expected)}
    end
    from = ITEMS + expected - start
end
local count = ITEMS + given - from
if count > 0 then
    if ended then
        return {'closed', ended}
    end
    if at ~= '' then
        if tonumber(at) + from - ITEMS ~= following then
            return {'misplaced', text(following)}
        end
    end
    local size = 0
    for index = from, #ARGV do
        size = size + #ARGV[index] + input_cost
    end
    if inputs_bytes > 0 and tonumber(run[3] or 0) + size > inputs_bytes then
        return {'full', run[3] or '0'}
    end

    local time = call('TIME')
    local now = text(time[1] * 1000 + math.floor(time[2] / 1000))
    local before = following
    for index = from, #ARGV do
        call('XADD', KEYS[3], text(following + 1) .. '-0', 't', now, 'd', ARGV[index])
        bytes = bytes + #ARGV[index] + #text(following) + 13  -- the frame: "id: ", "\ndata: ", "\n\n"
        following = following + 1
    end
    last = following - 1
    if inputs_bytes > 0 then
        call('HSET', KEYS[1], 'inputs', text(tonumber(run[3] or 0) + size))
    end
    if keep_bytes > 0 and bytes > keep_bytes and following - first > 1 then
        while bytes > keep_bytes and first < following - 1 do
            local oldest = call('XRANGE', KEYS[3], text(first + 1) .. '-0', '+', 'COUNT', 64)
            if #oldest == 0 then
                break
            end
            for _, entry in ipairs(oldest) do
                if bytes <= keep_bytes or first >= following - 1 then
                    break
                end
                bytes = bytes - #entry[2][4] - #text(first) - 13
                first = first + 1
            end
        end
        call('XTRIM', KEYS[3], 'MINID', text(first + 1) .. '-0')
    end
    call('HSET', KEYS[2], NEXT, text(following), FIRST, text(first), BYTES, text(bytes))
    if producer ~= '' then
        call('HSET', KEYS[2], counter, text(expected + count) .. ' ' .. text(last))
    end
    if size <= inline_bytes then
        local message = 'a ' .. text(before) .. ' ' .. now .. '\n' .. table.concat(ARGV, '\n', from)
        call('SPUBLISH', channel, message)
    else
        call('SPUBLISH', channel, 'p ' .. text(following))
    end
end
if ending ~= '' and not ended then
    call('HSET', KEYS[2], NEXT, text(following), END, ending)
    call('SPUBLISH', channel, 'e ' .. text(following) .. '\n' .. ending)
end
return {'ok', text(last), text(following)}

#!lua flags=no-writes
-- A page of a stream: the retained range, how it ended, and the entries after a seq (the newest ones after 'tail').
-- KEYS: the run, its streams, the entries of this stream.
local name, after, limit, max_bytes = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])

local function text(number)
    return string.format('%d', number)
end

local run = redis.call('HMGET', KEYS[1], 'version', 'end')
if not run[1] then
    return {'missing'}
end
local stream = redis.call('HMGET', KEYS[2], 'n:' .. name, 'f:' .. name, 'b:' .. name, 'e:' .. name)
local following, first, bytes = tonumber(stream[1] or 0), tonumber(stream[2] or 0), tonumber(stream[3] or 0)
local entries = {}
if following > first then
    local mean_bytes = bytes / (following - first)  -- bounds the answer in bytes, roughly
    local count = math.max(1, math.min(limit, math.floor(max_bytes / mean_bytes)))
    local from
    if after == 'tail' then
        from = math.max(first, following - count)
    else
        from = math.max(first, tonumber(after) + 1)
    end
    if from < following then
        entries = redis.call('XRANGE', KEYS[3], text(from + 1) .. '-0', '+', 'COUNT', count)
    end
end
return {'ok', text(first), text(following), stream[4] or run[2] or '', entries}

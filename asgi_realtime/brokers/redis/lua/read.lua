#!lua flags=no-writes
-- A page of a stream: what is retained, how it ended, and entries after a position (or the newest, if that is 'tail').
-- KEYS: the run, the positions of its streams, the entries of this stream.
local name, after, limit, max_bytes = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])

local function text(number)
    return string.format('%d', number)
end

local run = redis.call('HMGET', KEYS[1], 'version', 'end')
if not run[1] then
    return {'gone'}
end
local held = redis.call('HMGET', KEYS[2], 'n:' .. name, 'f:' .. name, 'b:' .. name, 'e:' .. name)
local following, first, bytes = tonumber(held[1] or 0), tonumber(held[2] or 0), tonumber(held[3] or 0)
local entries = {}
if following > first then
    local usual = bytes / (following - first)  -- of one entry; what is asked for is bounded by bytes, roughly
    local count = math.max(1, math.min(limit, math.floor(max_bytes / usual)))
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
return {'ok', text(first), text(following), held[4] or run[2] or '', entries}

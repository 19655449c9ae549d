#!lua flags=allow-oom
-- The partitions that may have something due now. Their notes are put aside: whoever polls looks and notes anew.
-- KEYS: the notes of one kind.
local time = redis.call('TIME')
local now = string.format('%d', time[1] * 1000 + math.floor(time[2] / 1000))
local found = redis.call('ZRANGE', KEYS[1], '-inf', now, 'BYSCORE')
for _, partition in ipairs(found) do
    redis.call('ZADD', KEYS[1], '9e15', partition)
end
return found

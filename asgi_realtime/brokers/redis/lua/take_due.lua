#!lua flags=allow-oom
-- Puts off a run that is due, by ARGV[2] ms from now; returns 0 if it is not due. KEYS: the times of one kind.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local at = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not at or tonumber(at) > now then
    return 0
end
redis.call('ZADD', KEYS[1], string.format('%d', now + ARGV[2]), ARGV[1])
return 1

#!lua flags=allow-oom
-- Counts the readers that a process has of a run, and sets when the run is due as `unwatched`. Returns that time.
-- KEYS: the run, its watchers, the times of `unwatched`.
local run_id, process, readers = ARGV[1], ARGV[2], tonumber(ARGV[3])
local lease_ms, grace_ms = tonumber(ARGV[4]), tonumber(ARGV[5])  -- no grace: never due
local run = redis.call('HMGET', KEYS[1], 'version', 'end')
if not run[1] or run[2] then
    return ''
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if readers > 0 then
    redis.call('HSET', KEYS[2], process, string.format('%d %d', readers, now + lease_ms))
    redis.call('PEXPIRE', KEYS[2], lease_ms)
else
    redis.call('HDEL', KEYS[2], process)
end
if not grace_ms then
    return ''
end
local last = now
for _, counted in ipairs(redis.call('HVALS', KEYS[2])) do
    last = math.max(last, tonumber(string.match(counted, '%d+$')))
end
local at = string.format('%d', last + grace_ms)
redis.call('ZADD', KEYS[3], at, run_id)
return at

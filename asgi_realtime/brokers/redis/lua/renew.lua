#!lua flags=allow-oom
-- Renews the lease of an executing run if the caller owns it, or puts off the enqueueing of a queued run, or the
-- `on_end` of a run that is over. XX: a run that is not due at any time does not become due.
-- KEYS: the run, the times of `lease`, of `enqueue`, of `on_end`.
local run_id, owner, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local run = redis.call('HMGET', KEYS[1], 'state', 'owner')
local time = redis.call('TIME')
local until_ms = string.format('%d', time[1] * 1000 + math.floor(time[2] / 1000) + lease_ms)
if run[1] == 'executing' and run[2] == owner then
    redis.call('ZADD', KEYS[2], 'XX', until_ms, run_id)
elseif run[1] == 'queued' then
    redis.call('ZADD', KEYS[3], 'XX', until_ms, run_id)
elseif run[1] == 'ended' then
    redis.call('ZADD', KEYS[4], 'XX', until_ms, run_id)
end

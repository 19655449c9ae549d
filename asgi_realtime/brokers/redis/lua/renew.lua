#!lua flags=allow-oom
-- Puts off what a run is due for as long as somebody looks after it: its lease, if the owner asks, or its enqueueing.
-- KEYS: the run, leases, what is to be enqueued.
local run_id, owner, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local run = redis.call('HMGET', KEYS[1], 'state', 'owner')
local time = redis.call('TIME')
local until_ms = string.format('%d', time[1] * 1000 + math.floor(time[2] / 1000) + lease_ms)
if run[1] == 'executing' and run[2] == owner then
    redis.call('ZADD', KEYS[2], 'XX', until_ms, run_id)
elseif run[1] == 'queued' then
    redis.call('ZADD', KEYS[3], 'XX', until_ms, run_id)
end

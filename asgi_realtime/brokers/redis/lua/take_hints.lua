#!lua flags=allow-oom
-- The partitions that may have something due now. Their hints move on by ARGV[1] ms: if the caller is cut off before
-- it has read a partition, the next poll after that does. Returns the partitions, and the time their hints moved to.
-- KEYS: the hints of one kind.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local found = redis.call('ZRANGE', KEYS[1], '-inf', string.format('%d', now), 'BYSCORE')
local moved_to = string.format('%d', now + ARGV[1])
for _, partition in ipairs(found) do
    redis.call('ZADD', KEYS[1], moved_to, partition)
end
return {found, moved_to}

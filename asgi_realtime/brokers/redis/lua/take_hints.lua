#!lua flags=allow-oom
-- Takes the hints that are due, and moves them ARGV[1] ms into the future: if the caller fails before it has read a
-- partition, a later poll reads it. Returns the partitions, and the time that the hints moved to.
-- KEYS: the hints of one kind.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local found = redis.call('ZRANGE', KEYS[1], '-inf', string.format('%d', now), 'BYSCORE')
local moved_to = string.format('%d', now + ARGV[1])
for _, partition in ipairs(found) do
    redis.call('ZADD', KEYS[1], moved_to, partition)
end
return {found, moved_to}

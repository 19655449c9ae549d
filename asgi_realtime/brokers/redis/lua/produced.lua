#!lua flags=no-writes
-- How many items of a producer a stream has counted; nil if the run does not exist. KEYS: the run, its streams.
local name, producer = ARGV[1], ARGV[2]

if not redis.call('HGET', KEYS[1], 'version') then
    return nil
end
local counter = redis.call('HGET', KEYS[2], 'p:' .. name .. '\0' .. producer)
return counter and tonumber(string.match(counter, '^%d+')) or 0

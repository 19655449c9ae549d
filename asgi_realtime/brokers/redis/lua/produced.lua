#!lua flags=no-writes
-- How many items of a producer a stream has counted; nothing if there is no such run.
-- KEYS: the run, the positions of its streams.
local name, producer = ARGV[1], ARGV[2]

if not redis.call('HGET', KEYS[1], 'version') then
    return nil
end
local held = redis.call('HGET', KEYS[2], 'p:' .. name .. '\0' .. producer)
return held and tonumber(string.match(held, '^%d+')) or 0

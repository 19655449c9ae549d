#!lua flags=allow-oom
-- Hints that a partition has something due: at a time (a<unix ms>), or after a delay from now (r<ms>).
-- KEYS: the hints of each kind. ARGV: the partition, then a time for each key.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for index, key in ipairs(KEYS) do
    local at = tonumber(string.sub(ARGV[index + 1], 2))
    if string.sub(ARGV[index + 1], 1, 1) == 'r' then
        at = at + now
    end
    redis.call('ZADD', key, 'LT', string.format('%d', at), ARGV[1])
end

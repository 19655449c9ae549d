#!lua flags=allow-oom
-- Notes that a partition may have something due from a time on: at (a…) that time, or so long from now (r…).
-- KEYS: one for each kind. ARGV: the partition, then a time for each.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for index, key in ipairs(KEYS) do
    local at = tonumber(string.sub(ARGV[index + 1], 2))
    if string.sub(ARGV[index + 1], 1, 1) == 'r' then
        at = at + now
    end
    redis.call('ZADD', key, 'LT', string.format('%d', at), ARGV[1])
end

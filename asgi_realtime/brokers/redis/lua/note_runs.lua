#!lua
-- Notes runs in a list of those that changed last, and drops those beyond its size. A newer version stays.
-- KEYS: ZSET of run ids by the time of their change; HASH of `<version> <summary>` by run id.
-- ARGV: the size, the lifetime of the list in ms, and for each run: id, time, version, summary.
for i = 3, #ARGV, 4 do
    local known = redis.call('HGET', KEYS[2], ARGV[i])
    if not known or tonumber(string.match(known, '^%d+')) <= tonumber(ARGV[i + 2]) then
        redis.call('ZADD', KEYS[1], ARGV[i + 1], ARGV[i])
        redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 2] .. ' ' .. ARGV[i + 3])
    end
end
local extra = redis.call('ZCARD', KEYS[1]) - ARGV[1]
if extra > 0 then
    local dropped = redis.call('ZPOPMIN', KEYS[1], extra)
    for i = 1, #dropped, 2 do
        redis.call('HDEL', KEYS[2], dropped[i])
    end
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])

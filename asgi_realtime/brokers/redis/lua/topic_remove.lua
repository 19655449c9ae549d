#!lua flags=allow-oom
-- Removes a run from a topic, and the topic with its last run. KEYS: the topic's positions and versions.
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
if redis.call('ZCARD', KEYS[1]) == 0 then
    redis.call('DEL', KEYS[1], KEYS[2])
end
redis.call('SPUBLISH', ARGV[2], 'f ' .. ARGV[1])

#!lua flags=allow-oom
-- Clears the mark of a commit whose topics have been published to, unless a later commit has set its own.
-- KEYS: the run, the times of `unpublished`.
if redis.call('HGET', KEYS[1], 'version') == ARGV[2] then
    redis.call('ZREM', KEYS[2], ARGV[1])
end

#!lua flags=allow-oom
-- Takes back the mark of a commit, if no later commit has left its own.
-- KEYS: the run, what is unpublished.
if redis.call('HGET', KEYS[1], 'version') == ARGV[2] then
    redis.call('ZREM', KEYS[2], ARGV[1])
end

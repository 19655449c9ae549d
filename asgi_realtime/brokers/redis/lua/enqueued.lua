#!lua flags=allow-oom
-- A queue has the run. KEYS: what is to be enqueued.
redis.call('ZREM', KEYS[1], ARGV[1])

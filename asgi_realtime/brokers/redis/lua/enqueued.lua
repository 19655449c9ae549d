#!lua flags=allow-oom
-- A queue has accepted the run, so it is no longer due as `enqueue`. KEYS: the times of that kind.
redis.call('ZREM', KEYS[1], ARGV[1])

#!lua flags=allow-oom
-- Drops the hint of a partition that has nothing due at any time, unless another was added since it was taken.
-- KEYS: the hints of one kind. ARGV: the partition, the time that its hint moved to.
if redis.call('ZSCORE', KEYS[1], ARGV[1]) == ARGV[2] then
    redis.call('ZREM', KEYS[1], ARGV[1])
end

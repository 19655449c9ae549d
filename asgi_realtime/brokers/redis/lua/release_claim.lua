#!lua flags=allow-oom
-- Takes back a claim, if it still stands for this run. KEYS: the claim.
if redis.call('GET', KEYS[1]) == ARGV[1] then
    redis.call('DEL', KEYS[1])
end

#!lua flags=allow-oom
-- Releases a claim if its value is still this run. KEYS: the claim.
if redis.call('GET', KEYS[1]) == ARGV[1] then
    redis.call('DEL', KEYS[1])
end

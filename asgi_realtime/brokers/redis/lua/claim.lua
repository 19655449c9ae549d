#!lua
-- Stores a value under a key, unless the key has one other than the one to replace. Returns the value that it has then.
-- KEYS: the claim.
local value, ttl_ms, instead_of = ARGV[1], ARGV[2], ARGV[3]
local stored = redis.call('GET', KEYS[1])
if stored and stored ~= instead_of then
    return stored
end
redis.call('SET', KEYS[1], value, 'PX', ttl_ms)
return value

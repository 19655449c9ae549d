#!lua flags=no-writes
-- The earliest time of each kind in a partition, or an empty string. KEYS: the kinds.
local firsts = {}
for index, key in ipairs(KEYS) do
    firsts[index] = redis.call('ZRANGE', key, '-inf', '+inf', 'BYSCORE', 'LIMIT', 0, 1, 'WITHSCORES')[2] or ''
end
return firsts

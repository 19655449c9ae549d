#!lua flags=allow-oom
-- Removes a run that is over. KEYS: the run, its streams, the nine kinds of due times, the entries of each stream.
-- The caller has listed the streams before. If one has been added since, nothing is removed and the run stays due.
local run_id, channel, streams = ARGV[1], ARGV[2], tonumber(ARGV[3])
local ended = redis.call('HGET', KEYS[1], 'end')
if not ended then
    return redis.call('EXISTS', KEYS[1]) == 0 and 1 or 0
end
local found = 0
for _, field in ipairs(redis.call('HKEYS', KEYS[2])) do
    if string.sub(field, 1, 2) == 'n:' then
        found = found + 1
    end
end
if found ~= streams then
    return 0
end
redis.call('DEL', KEYS[1], KEYS[2])
for index = 3, 11 do
    redis.call('ZREM', KEYS[index], run_id)
end
for index = 12, #KEYS do
    redis.call('UNLINK', KEYS[index])
end
redis.call('SPUBLISH', channel, 'r')
return 1

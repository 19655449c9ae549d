#!lua flags=no-writes
-- How many readers all processes have of a run. KEYS: the run, its watchers.
local run = redis.call('HMGET', KEYS[1], 'version', 'end')
if not run[1] or run[2] then
    return 0
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local watchers = 0
for _, counted in ipairs(redis.call('HVALS', KEYS[2])) do
    local readers, until_ms = string.match(counted, '^(%d+) (%d+)$')
    if tonumber(until_ms) > now then
        watchers = watchers + tonumber(readers)
    end
end
return watchers

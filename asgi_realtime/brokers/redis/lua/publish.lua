#!lua flags=allow-oom
-- Moves a run to the end of a topic, unless the topic knows this version or a newer one. The version is stored already,
-- so full memory is no reason to refuse. KEYS: the topic's positions and versions.
local run_id, version, step, epoch = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local max_runs, channel = tonumber(ARGV[5]), ARGV[6]

local function text(number)
    return string.format('%d', number)
end

local known = redis.call('HMGET', KEYS[2], '#epoch', '#position', run_id)
if known[3] and tonumber(known[3]) >= version then
    return
end
local before = tonumber(known[2] or 0)
local position = before + step
if known[1] then
    epoch = known[1]
else
    redis.call('HSET', KEYS[2], '#epoch', epoch, '#floor', '0')
end
redis.call('ZADD', KEYS[1], text(position), run_id)
redis.call('HSET', KEYS[2], '#position', text(position), run_id, text(version))
local excess = redis.call('ZCARD', KEYS[1]) - max_runs
if excess > 0 then
    local dropped = redis.call('ZPOPMIN', KEYS[1], excess)
    for index = 1, #dropped, 2 do
        redis.call('HDEL', KEYS[2], dropped[index])
    end
    redis.call('HSET', KEYS[2], '#floor', dropped[#dropped])
end
redis.call('SPUBLISH', channel, table.concat({'t', epoch, text(before), text(position), text(version), run_id}, ' '))

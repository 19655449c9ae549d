-- Stores a version of a run if the stored version is the expected one. Checks everything before it writes anything.
-- KEYS: the run, its streams, then the due times of its partition: lease, enqueue, on_end, unpublished, delay, ttl,
-- cancel, expiry, unwatched.
local run_id, expect, version, mark = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local record, payload, output, ending = ARGV[5], ARGV[6], ARGV[7], ARGV[8]
local state, owner, lease_ms, has_topics = ARGV[9], ARGV[10], tonumber(ARGV[11]), ARGV[12] == '1'
local channel, step, epoch, marks_kept = ARGV[13], tonumber(ARGV[14]), ARGV[15], tonumber(ARGV[16])
local DUE = 17  -- the index of four times in ARGV: delay, ttl, cancel, expiry
local FLOORS = 21  -- then in threes: a stream, a producer, and how many of its items must be counted

local function text(number)
    return string.format('%d', number)
end

local run = redis.call('HMGET', KEYS[1], 'version', 'm:' .. mark, 'position', 'state', 'end')
if run[2] then
    return {'ok', run[2], '0'}
end
local stored = tonumber(run[1] or 0)
if run[5] or stored ~= expect or (expect > 0 and version ~= expect + 1) then
    return {'conflict', text(stored), redis.call('HMGET', KEYS[1], 'record', 'payload', 'output')}
end
for index = FLOORS, #ARGV, 3 do
    local counted = redis.call('HGET', KEYS[2], 'p:' .. ARGV[index] .. '\0' .. ARGV[index + 1])
    if tonumber(string.match(counted or '0', '^%d+')) < tonumber(ARGV[index + 2]) then
        return {'behind', ARGV[index]}
    end
end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local before = tonumber(run[3] or 0)
local position = text(before + step)
redis.call('HSET', KEYS[1], 'version', text(version), 'record', record, 'position', position,
    'state', state, 'owner', owner, 'm:' .. mark, text(version), 'v:' .. text(version), mark)
if expect == 0 then
    redis.call('HSET', KEYS[1], 'epoch', epoch)
end
if payload ~= '' then
    redis.call('HSET', KEYS[1], 'payload', payload)
end
if output ~= '' then
    redis.call('HSET', KEYS[1], 'output', output)
end
local oldest = 'v:' .. text(version - marks_kept)
local old = redis.call('HGET', KEYS[1], oldest)
if old then
    redis.call('HDEL', KEYS[1], oldest, 'm:' .. old)
end

local has_new_lease = '0'
for index, name in ipairs({'executing', 'queued', 'ended'}) do
    if state ~= name then
        redis.call('ZREM', KEYS[2 + index], run_id)
    elseif run[4] ~= name then
        redis.call('ZADD', KEYS[2 + index], text(now + lease_ms), run_id)
        has_new_lease = '1'
    end
end
if has_topics then
    redis.call('ZADD', KEYS[6], text(now + 1000), run_id)  -- as _UNPUBLISHED_MS in schedule.py
end
for index = 0, 3 do
    if ARGV[DUE + index] ~= '' then
        redis.call('ZADD', KEYS[7 + index], ARGV[DUE + index], run_id)
    else
        redis.call('ZREM', KEYS[7 + index], run_id)
    end
end

redis.call('SPUBLISH', channel, 'c ' .. text(before) .. ' ' .. position .. ' ' .. text(version))
if ending ~= '' then
    redis.call('HSET', KEYS[1], 'end', ending)
    redis.call('ZREM', KEYS[11], run_id)
    local positions = {}
    local fields = redis.call('HGETALL', KEYS[2])
    for index = 1, #fields, 2 do
        if string.sub(fields[index], 1, 2) == 'n:' then
            positions[string.sub(fields[index], 3)] = tonumber(fields[index + 1])
        end
    end
    local packed = next(positions) and cmsgpack.pack(positions) or '\128'  -- an empty map
    redis.call('SPUBLISH', channel, 'E ' .. #ending .. '\n' .. ending .. packed)
end
return {'ok', text(version), has_new_lease}

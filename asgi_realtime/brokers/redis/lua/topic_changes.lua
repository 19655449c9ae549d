#!lua flags=no-writes
-- The runs that changed after a position; the newest runs if the position has another epoch or was dropped.
-- KEYS: the topic's positions and versions.
local epoch, after, limit = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local head = redis.call('HMGET', KEYS[2], '#epoch', '#position', '#floor')
if not head[1] then
    return {'0', '0', '0', 1, {}, {}}
end
if epoch == '0' then  -- the cursor of a topic that did not exist: everything is after it
    epoch, after = head[1], 0
end
local position, floor = tonumber(head[2]), tonumber(head[3])
local snapshot = epoch ~= head[1] or after < floor or after > position
local found
if snapshot then
    found = redis.call('ZRANGE', KEYS[1], -limit, -1, 'WITHSCORES')
else
    found = redis.call('ZRANGE', KEYS[1], '(' .. string.format('%d', after), '+inf', 'BYSCORE', 'LIMIT', 0, limit + 1, 'WITHSCORES')
end
if not snapshot and #found > 2 * limit then
    found[#found], found[#found - 1] = nil, nil
    head[2] = found[#found]
end
local versions, ids = {}, {}
for index = 1, #found, 2 do
    ids[#ids + 1] = found[index]
    if #ids == 1000 or index + 2 > #found then
        for _, version in ipairs(redis.call('HMGET', KEYS[2], unpack(ids))) do
            versions[#versions + 1] = version
        end
        ids = {}
    end
end
return {head[1], head[2], head[3], snapshot and 1 or 0, found, versions}

"""The atomic steps on leases, as Lua. Each returns early with a number that the caller maps to an error."""

from __future__ import annotations

from phloem.shared.discovery.redis_link import Script

# The server's clock (us) keeps epochs growing even when the counter's last values were lost: nobody takes a
# million a second. Below 2^53, so Lua's numbers hold them exactly.
# KEYS: counter. Returns the epoch.
NEXT_EPOCH = Script(
    """
local t = redis.call('TIME')
local last = tonumber(redis.call('GET', KEYS[1]) or '0')
local epoch = math.max(last + 1, t[1] * 1000000 + t[2])
redis.call('SET', KEYS[1], string.format('%.0f', epoch))
return string.format('%.0f', epoch)
"""
)

# KEYS: lease, fence, members. ARGV: member, epoch, record, lease ms, fence ms, channel, notify.
# Returns {held before or -1 when fenced, run id}.
RENEW = Script(
    """
local fence = tonumber(redis.call('GET', KEYS[2]) or '0')
local epoch = tonumber(ARGV[2])
if fence > epoch then return {-1, string.format('%.0f', fence)} end
local held = 0
if fence == epoch and redis.call('EXISTS', KEYS[1]) == 1 then held = 1 end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[5])
redis.call('ZADD', KEYS[3], string.format('%.0f', now + ARGV[4]), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', string.format('%.0f', now - ARGV[5]))
if held == 0 or ARGV[7] == '1' then redis.call('PUBLISH', ARGV[6], ARGV[1]) end
return {held, string.match(redis.call('INFO', 'server'), 'run_id:(%x+)') or ''}
"""
)

# A lease that was given back stays closed to its epoch: a heartbeat still in flight can't reopen it.
# KEYS: lease, fence, members. ARGV: member, epoch, fence ms, channel. Returns 1 when it was the holder.
RELEASE = Script(
    """
local fence = tonumber(redis.call('GET', KEYS[2]) or '0')
local epoch = tonumber(ARGV[2])
if fence > epoch then return 0 end
redis.call('SET', KEYS[2], string.format('%.0f', epoch + 1), 'PX', ARGV[3])
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('PUBLISH', ARGV[4], ARGV[1])
return 1
"""
)

# Of two claims on one device the older epoch wins: after a loss of data the one that runs there keeps it.
# KEYS: candidates. ARGV: epoch, owner, ms. Returns {1-based position or 0, held before}.
CLAIM_DEVICE = Script(
    """
local mine = ARGV[1] .. ' ' .. ARGV[2]
local free = 0
for i, key in ipairs(KEYS) do
  local holder = redis.call('GET', key)
  if holder == mine then
    redis.call('SET', key, mine, 'PX', ARGV[3])
    return {i, 1}
  end
  if not holder and free == 0 then free = i end
end
if free > 0 then redis.call('SET', KEYS[free], mine, 'PX', ARGV[3]) end
return {free, 0}
"""
)

# KEYS: device. ARGV: epoch, owner, ms. Returns 1 held, 0 taken anew, -1 when an older claim holds it.
RENEW_DEVICE = Script(
    """
local mine = ARGV[1] .. ' ' .. ARGV[2]
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= mine then
  local other = tonumber(string.match(holder, '^%d+')) or 0
  if other <= tonumber(ARGV[1]) then return -1 end
end
redis.call('SET', KEYS[1], mine, 'PX', ARGV[3])
if holder == mine then return 1 end
return 0
"""
)

# KEYS: device. ARGV: epoch, owner.
RELEASE_DEVICE = Script(
    """
if redis.call('GET', KEYS[1]) == ARGV[1] .. ' ' .. ARGV[2] then return redis.call('DEL', KEYS[1]) end
return 0
"""
)

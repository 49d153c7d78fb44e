"""What the index keeps in Redis: names, encodings, and the Lua that changes several of them as one.

| key | type | meaning |
| --- | --- | --- |
| phloem:ix:b:HASH | string | one block: bit s is set when the worker of slot s holds it |
| phloem:ix:a:HASH | string, PX | "EPOCH WORKER": was just sent a prompt with this block to compute |
| phloem:ix:slots | hash | slot -> "EPOCH WORKER": leased slots |
| phloem:ix:seq | hash | slot -> last sequence number applied |
| phloem:ix:digest | hash | slot -> "BLOCKS DIGEST" of the bits set in it (`shared/tree_digest.py`) |
| phloem:ix:retired | hash | slot -> stamp: its bits are being cleared |
| phloem:ix:free | zset | cleared slots, lowest first, so that bitmaps stay short |
| phloem:ix:high | string | slots 0 .. high-1 have ever been leased: each is leased, retired or free |
| phloem:ix:version | string | random, new whenever `slots` changes |
| phloem:ix:sweeper | string, PX | the replica that sweeps now |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from phloem.shared.block_hash import HASH_BYTES
from phloem.shared.discovery.redis_link import Script
from phloem.shared.protocol.session import PeerRef
from phloem.shared.tree_digest import DIGEST_BYTES, digest_text

SLOTS = "phloem:ix:slots"
SEQ = "phloem:ix:seq"
DIGESTS = "phloem:ix:digest"
RETIRED = "phloem:ix:retired"
FREE = "phloem:ix:free"
HIGH = "phloem:ix:high"
VERSION = "phloem:ix:version"
SWEEPER = "phloem:ix:sweeper"

_BLOCK_PREFIX = b"phloem:ix:b:"
BLOCK_PATTERN = _BLOCK_PREFIX + b"*"
_ANNOUNCEMENT_PREFIX = b"phloem:ix:a:"
_EMPTY_DIGEST = digest_text(0, 0)
# Where the digested end of a block's hash begins in its key; Lua counts from 1.
_DIGESTED_FROM = len(_BLOCK_PREFIX) + HASH_BYTES - DIGEST_BYTES + 1


def block_key(block_hash: bytes) -> bytes:
    return _BLOCK_PREFIX + block_hash


def block_keys(block_hashes: Iterable[bytes]) -> Iterator[bytes]:
    return map(_BLOCK_PREFIX.__add__, block_hashes)


def hash_of(key: bytes) -> bytes:
    """The block of a `block_key`."""
    return key[len(_BLOCK_PREFIX) :]


def announcement_key(block_hash: bytes) -> bytes:
    return _ANNOUNCEMENT_PREFIX + block_hash


def bit_offset(slot: int) -> int:
    """Redis numbers bits from a byte's most significant one; with this offset `bitmap` is plain."""
    return slot ^ 7


def bitmaps(values: Iterable[bytes | None]) -> list[int]:
    """Blocks' values as integers whose bit s is slot s; a missing block is held by nobody."""
    return [0 if value is None else int.from_bytes(value, "little") for value in values]


def owner(worker: PeerRef) -> str:
    return f"{worker.epoch} {worker.worker_id}"


def worker_of(owner_text: str) -> PeerRef:
    epoch, _, worker_id = owner_text.partition(" ")
    return PeerRef(worker_id, int(epoch))


# KEYS: slots, seq, retired, free, high, version, fence, digests. ARGV: epoch, worker, max slots, nonce.
# Returns the slot, -1 when a newer epoch of the worker is known, -2 when no slot is left.
# What the worker had before is retired in the same step, so that no bit outlives the tree it spoke for.
ATTACH = Script(
    f"""
local epoch = tonumber(ARGV[1])
if tonumber(redis.call('GET', KEYS[7]) or '0') > epoch then return -1 end
local owned = {{}}
local slots = redis.call('HGETALL', KEYS[1])
for i = 1, #slots, 2 do
  local other, worker = string.match(slots[i + 1], '^(%d+) (.*)$')
  if worker == ARGV[2] then
    if tonumber(other) > epoch then return -1 end
    owned[#owned + 1] = slots[i]
  end
end
for _, slot in ipairs(owned) do
  redis.call('HDEL', KEYS[1], slot)
  redis.call('HDEL', KEYS[2], slot)
  redis.call('HDEL', KEYS[8], slot)
  redis.call('HSET', KEYS[3], slot, ARGV[4])
end
redis.call('SET', KEYS[6], ARGV[4])
local slot = redis.call('ZPOPMIN', KEYS[4])[1]
if not slot then
  local high = tonumber(redis.call('GET', KEYS[5]) or '0')
  if high >= tonumber(ARGV[3]) then return -2 end
  redis.call('SET', KEYS[5], high + 1)
  slot = tostring(high)
end
redis.call('HSET', KEYS[1], slot, ARGV[1] .. ' ' .. ARGV[2])
redis.call('HSET', KEYS[2], slot, '0')
redis.call('HSET', KEYS[8], slot, '{_EMPTY_DIGEST}')
return tonumber(slot)
"""
)

# KEYS: slots, version. Returns {version or false, slot, owner, slot, owner, ...}.
READ_SLOTS = Script(
    """
local reply = redis.call('HGETALL', KEYS[1])
table.insert(reply, 1, redis.call('GET', KEYS[2]))
return reply
"""
)

# KEYS: slots, seq, digests, blocks. ARGV: slot, owner, seq, bit, how many of the blocks are removed (the
# first ones), whether this is the last part. Returns 1, or 0 when the worker must resync. A repeated seq was
# applied. The digest follows the bits as they are found, not the message.
PUBLISH = Script(
    f"""
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
local last = tonumber(redis.call('HGET', KEYS[2], ARGV[1]))
local seq = tonumber(ARGV[3])
if last == seq then return 1 end
if last ~= seq - 1 then return 0 end
local bit_offset = ARGV[4]
local num_removed = tonumber(ARGV[5])
local digest = redis.call('HGET', KEYS[3], ARGV[1]) or '{_EMPTY_DIGEST}'
local count, high, low = string.match(digest, '^(%d+) (%x%x%x%x%x%x%x%x)(%x+)$')
high, low = tonumber(high, 16), tonumber(low, 16)
for i = 4, num_removed + 3 do
  local block = KEYS[i]
  if redis.call('GETBIT', block, bit_offset) == 1 then
    redis.call('SETBIT', block, bit_offset, 0)
    if redis.call('BITCOUNT', block) == 0 then redis.call('DEL', block) end
    local block_high, block_low = struct.unpack('>I4I4', block, {_DIGESTED_FROM})
    count, high, low = count - 1, bit.bxor(high, block_high), bit.bxor(low, block_low)
  end
end
for i = num_removed + 4, #KEYS do
  local block = KEYS[i]
  if redis.call('SETBIT', block, bit_offset, 1) == 0 then
    local block_high, block_low = struct.unpack('>I4I4', block, {_DIGESTED_FROM})
    count, high, low = count + 1, bit.bxor(high, block_high), bit.bxor(low, block_low)
  end
end
redis.call('HSET', KEYS[3], ARGV[1], string.format('%d ', count) .. bit.tohex(high) .. bit.tohex(low))
if ARGV[6] == '1' then redis.call('HSET', KEYS[2], ARGV[1], ARGV[3]) end
return 1
"""
)

# KEYS: slots, seq, digests, blocks. ARGV: slot, owner, seq, digest, bit. Returns 1 when the slot is its
# owner's, is as far as seq, has this digest, and holds all these blocks.
VERIFY = Script(
    """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
if redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[3] then return 0 end
if redis.call('HGET', KEYS[3], ARGV[1]) ~= ARGV[4] then return 0 end
for i = 4, #KEYS do
  if redis.call('GETBIT', KEYS[i], ARGV[5]) == 0 then return 0 end
end
return 1
"""
)

# KEYS: slots, seq, retired, version, lease, fence, digests. ARGV: slot, owner, epoch, nonce.
# Returns 1 when the slot was its owner's and the owner is dead.
RETIRE = Script(
    """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
if redis.call('EXISTS', KEYS[5]) == 1 and redis.call('GET', KEYS[6]) == ARGV[3] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[7], ARGV[1])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[4])
redis.call('SET', KEYS[4], ARGV[4])
return 1
"""
)

# KEYS: retired, blocks. ARGV: slot, stamp, bit. Returns 0 when the slot was swept by another meanwhile.
CLEAR = Script(
    """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
for i = 2, #KEYS do
  if redis.call('GETBIT', KEYS[i], ARGV[3]) == 1 then
    redis.call('SETBIT', KEYS[i], ARGV[3], 0)
    if redis.call('BITCOUNT', KEYS[i]) == 0 then redis.call('DEL', KEYS[i]) end
  end
end
return 1
"""
)

# KEYS: retired, free. ARGV: slot, stamp.
FREE_SLOT = Script(
    """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], ARGV[1], ARGV[1])
return 1
"""
)

# KEYS: lock. ARGV: token, ms. Takes or keeps the lock.
LOCK = Script(
    """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
)

# KEYS: lock. ARGV: token.
UNLOCK = Script(
    """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
)

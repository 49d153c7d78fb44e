"""A digest of a set of blocks: independent of their order, kept up to date one block at a time.

A worker keeps one over what it published, the index one over the bits of its slot (in Lua,
`services/cache_index/layout.py`). Block hashes are uniform already, so their XOR is a digest; of each, the
last 8 bytes count. Two different sets of equal size agree with probability 2**-64. Nobody attacks it: a
worker would only deceive itself.
"""

from __future__ import annotations

DIGEST_BYTES = 8


class TreeDigest:
    """The number of blocks and the XOR of their last 8 bytes, as an unsigned big-endian number."""

    def __init__(self) -> None:
        self.num_blocks = 0
        self.value = 0

    def add(self, block_hash: bytes) -> None:
        """`block_hash` must not be in the set."""
        self.num_blocks += 1
        self.value ^= int.from_bytes(block_hash[-DIGEST_BYTES:], "big")

    def remove(self, block_hash: bytes) -> None:
        """`block_hash` must be in the set."""
        self.num_blocks -= 1
        self.value ^= int.from_bytes(block_hash[-DIGEST_BYTES:], "big")


def digest_text(num_blocks: int, value: int) -> str:
    """As the index keeps it in Redis."""
    return f"{num_blocks} {value:016x}"

"""Keyed hashes of 64-token blocks: the names under which the cluster knows prefixes.

h[i] = blake2b-128(key, h[i-1] || salt length || salt || tokens as little-endian uint32). Keyed with a
secret of the cluster, so that a tenant can neither forge another's prefix nor test for it; a different
`cache_salt` gives different names for equal tokens.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b

BLOCK_TOKENS = 64
HASH_BYTES = 16

LANDMARK_STRIDE = 16

_ROOT = b"\0" * HASH_BYTES


class BlockHasher:
    """Hashes chains of blocks under one cluster secret."""

    def __init__(self, cluster_secret: bytes) -> None:
        key = blake2b(cluster_secret, digest_size=32, person=b"phloem-blocks").digest()
        self._keyed = blake2b(digest_size=HASH_BYTES, key=key)

    def chain(self, token_ids: Sequence[int], salt: str = "", *, known: Sequence[bytes] = ()) -> list[bytes]:
        """Hashes of all full blocks of `token_ids`, 16 bytes each; a partial last block has none.

        `known` are the first hashes of the same chain, computed before; only the rest is computed.
        Token ids must lie in [0, 2**32).
        """
        num_blocks = len(token_ids) // BLOCK_TOKENS
        hashes = list(known[:num_blocks])
        if len(hashes) == num_blocks:
            return hashes
        first = len(hashes) * BLOCK_TOKENS
        words = array("I", token_ids[first : num_blocks * BLOCK_TOKENS])
        if sys.byteorder == "big":
            words.byteswap()
        data = memoryview(words.tobytes())
        salt_bytes = salt.encode()
        prefix = len(salt_bytes).to_bytes(4, "little") + salt_bytes
        parent = hashes[-1] if hashes else _ROOT
        step = BLOCK_TOKENS * 4
        for offset in range(0, len(data), step):
            state = self._keyed.copy()
            state.update(parent + prefix)
            state.update(data[offset : offset + step])
            parent = state.digest()
            hashes.append(parent)
        return hashes


def landmarks(num_blocks: int) -> list[int]:
    """Indices of the blocks of a chain under which an announcement of it is found, ascending.

    1, 2, 4, 8, 16, 32, 48, ... blocks deep, and the last one: a chain that shares a prefix is found to within
    16 blocks, and an equal one exactly, at the price of a sixteenth of its blocks.
    """
    if num_blocks <= 0:
        return []
    depths = {1, 2, 4, 8, *range(LANDMARK_STRIDE, num_blocks, LANDMARK_STRIDE), num_blocks}
    return sorted(depth - 1 for depth in depths if depth <= num_blocks)

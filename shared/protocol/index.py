"""Worker, gateway <-> cache_index.

A worker attaches once per epoch and is given a slot; then it publishes, in order, what its radix tree
stored and removed. A gateway asks which workers hold how much of a prompt. Block hashes are 16 bytes each
(`shared/block_hash.py`).
"""

from __future__ import annotations

import msgspec

from phloem.shared.protocol.codec import Codec
from phloem.shared.protocol.session import PeerRef

INDEX_SERVICE = "phloem.CacheIndex"


class Attach(msgspec.Struct, frozen=True):
    """A worker asks for an empty slot for (worker, epoch)."""

    worker: PeerRef


class Attached(msgspec.Struct, frozen=True):
    slot: int


class Publish(msgspec.Struct, frozen=True, kw_only=True):
    """Changes of one tree since the last `seq`; `seq` starts at 1 per slot and grows by one.

    A gap, a slot that is not (any longer) the worker's, or a stale epoch raises `resync_needed`: the worker
    attaches anew and publishes its whole tree.
    """

    worker: PeerRef
    slot: int
    seq: int
    stored: list[bytes] = []
    removed: list[bytes] = []


class Published(msgspec.Struct, frozen=True):
    seq: int


class Match(msgspec.Struct, frozen=True):
    """Which live workers hold a prefix of this chain of block hashes?"""

    block_hashes: list[bytes]


class Holder(msgspec.Struct, frozen=True):
    worker: PeerRef
    num_blocks: int  # leading blocks of the chain that the worker holds, > 0


class Matched(msgspec.Struct, frozen=True):
    holders: list[Holder]


attach: Codec[Attach] = Codec(Attach)
attached: Codec[Attached] = Codec(Attached)
publish: Codec[Publish] = Codec(Publish)
published: Codec[Published] = Codec(Published)
match: Codec[Match] = Codec(Match)
matched: Codec[Matched] = Codec(Matched)

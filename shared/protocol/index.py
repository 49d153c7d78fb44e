"""Worker, gateway <-> cache_index.

A worker attaches once per epoch and is given a slot; then it publishes, in order, what its radix tree
stored and removed, and now and then a digest of all that it published. A gateway keeps one stream per
replica: look-ups and announcements go down, answers come up, in any order. Block hashes are 16 bytes each
(`shared/block_hash.py`).
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from phloem.shared.errors import ErrorInfo
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


class Verify(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker published to this slot up to `seq`, as a digest (`shared/tree_digest.py`), and some of
    these blocks by name. If the slot holds anything else, the answer is `resync_needed`."""

    worker: PeerRef
    slot: int
    seq: int
    num_blocks: int
    digest: int
    sample: list[bytes] = []


class Verified(msgspec.Struct, frozen=True):
    seq: int


class Match(msgspec.Struct, frozen=True):
    """Which live workers hold a prefix of this chain of block hashes?"""

    block_hashes: list[bytes]


class Holder(msgspec.Struct, frozen=True):
    worker: PeerRef
    num_blocks: int  # leading blocks of the chain that the worker holds, > 0


class Matched(msgspec.Struct, frozen=True):
    """`holders` is what the workers' trees hold. `announced` is what gateways have just sent them to compute:
    it may never come true, and is for routing alone."""

    holders: list[Holder]
    announced: list[Holder] = []


class Lookup(msgspec.Struct, frozen=True, tag=True):
    """A `Match` on the stream; `id` is the gateway's own and names the answer."""

    id: int
    block_hashes: list[bytes]


class Announce(msgspec.Struct, frozen=True, tag=True):
    """A gateway has just sent `worker` a prompt to compute. `block_hashes` are the landmarks of its chain
    (`shared/block_hash.py`). Not answered."""

    worker: PeerRef
    block_hashes: list[bytes]


class Answer(msgspec.Struct, frozen=True):
    """To one `Lookup`: either `matched` or `error`."""

    id: int
    matched: Matched | None = None
    error: ErrorInfo | None = None


IndexDown: TypeAlias = Lookup | Announce


attach: Codec[Attach] = Codec(Attach)
attached: Codec[Attached] = Codec(Attached)
publish: Codec[Publish] = Codec(Publish)
published: Codec[Published] = Codec(Published)
verify: Codec[Verify] = Codec(Verify)
verified: Codec[Verified] = Codec(Verified)
match: Codec[Match] = Codec(Match)
matched: Codec[Matched] = Codec(Matched)
index_down: Codec[list[IndexDown]] = Codec(list[IndexDown])
index_up: Codec[list[Answer]] = Codec(list[Answer])

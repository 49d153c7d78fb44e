"""The staging memory of all channels of an endpoint: allocated once, at start, and lent in blocks.

    pool     [ block | block | block | block | block | ... ]    `num_blocks` of `staging_bytes`
    leases     `------- first ------'   `- second'              one a channel, of at least one block
    slots    [   s   |   s   |   s   |  s | s  | ... ]          cut when both sides agreed on their size

A channel borrows before it opens, keeps what it got, and never waits for another one's slots: a peer that
hangs holds its own and nobody else's. The first channels get `staging_slots` blocks, but only while a block
is left for each of `max_peers`; a channel of one block has two slots of half its size, so that one is filled
while the other one is sent.

One peer more than `max_peers` gets none, though blocks may be left: a channel keeps no more of them than the
peer gives credits for, but NCCL takes memory for each channel, and there is room for that of so many.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref

import torch
from torch import Tensor

from phloem.shared.errors import PhloemError
from phloem.shared.transfer.config import TransferConfig
from phloem.shared.transfer.errors import staging_full
from phloem.shared.transfer.staging import StagingSlot

log = logging.getLogger(__name__)

_LOOK_S = 0.005  # slots that nobody holds any more do not say so
_ALIGNMENT = 256  # bytes, of blocks and slots: kernels read several at a time


def blocks_to_lend(
    num_free: int, num_others: int, max_peers: int, staging_slots: int, num_returning: int = 0
) -> int:
    """Of the free blocks, what one more channel gets when so many other peers have one; 0: it gets none.
    `num_returning` more will be free in a moment.

    Where lost channels keep blocks, there may not be one for every peer that is still to come: who comes
    first has it."""
    if num_others >= max_peers or not num_free:
        return 0
    for_others = max(0, max_peers - num_others - 1 - num_returning)
    return max(1, min(staging_slots, num_free - for_others))


class StagingPool:
    """Thread-safe. What a device still has to do with memory that is lent again was queued before its channel
    was aborted, or its slot dropped: it is over before the next channel has opened, which takes a tenth of a
    second, and were it not, a digest would not fit."""

    def __init__(self, config: TransferConfig) -> None:
        """Raises what torch raises when the device has no room."""
        self._config = config
        # On a CPU memory that no channel used yet is an address and no more.
        shape = (config.num_blocks, _aligned(config.staging_bytes))
        self._blocks = torch.empty(shape, dtype=torch.uint8, device=config.device)
        self._changed = threading.Condition()  # guards all below
        self._free = list(range(config.num_blocks))  # a stack: memory that was used is used again
        self._leases: list[StagingLease] = []

    @property
    def lent_bytes(self) -> int:
        """Held by channels, and by what is left of those that have ended."""
        with self._changed:
            self._reclaim()
            num_lent = self._config.num_blocks - len(self._free) - self._num_quarantined()
            return num_lent * self._config.staging_bytes

    @property
    def is_lent(self) -> bool:
        """Whether a channel has memory: from before it opens until NCCL has let go of it."""
        with self._changed:
            return any(not lease.is_closed or lease.is_quarantined for lease in self._leases)

    @property
    def quarantined_bytes(self) -> int:
        """Lent to nobody any more: what held them has not let go."""
        with self._changed:
            return self._num_quarantined() * self._config.staging_bytes

    def lend(self, owner: str, wait_s: float = 0.0) -> StagingLease:
        """Memory for one channel of `owner`; waits for so long for what `owner` had before, which must be
        ending, and when there is none.

        Raises `staging_full`, with the flag to raise.
        """
        give_up_at = time.monotonic() + wait_s
        with self._changed:
            while (left_s := give_up_at - time.monotonic()) > 0 and not self._is_ready_for(owner):
                self._changed.wait(min(left_s, _LOOK_S))
            count = self._count(owner)
            if not count:
                raise self._full(owner)
            lease = StagingLease(self, self._config, owner, [self._free.pop() for _ in range(count)])
            self._leases.append(lease)
            return lease

    def block(self, index: int) -> Tensor:
        return self._blocks[index, : self._config.staging_bytes]

    def give_back(self, blocks: list[int]) -> None:
        """For leases: blocks of which no slot was cut."""
        with self._changed:
            self._free += blocks
            self._changed.notify_all()

    def quarantined(self, lease: StagingLease) -> None:
        """For leases: this one's blocks are."""
        config = self._config
        with self._changed:
            num_left = config.num_blocks - self._num_quarantined()
        log.error(
            "the channel %s has ended, but NCCL has not let go of its staging memory (%s), which nobody else "
            "gets any more; %s are left. Restart %s to have it back",
            lease.owner,
            _mib(len(lease.blocks) * config.staging_bytes),
            _mib(num_left * config.staging_bytes),
            config.me,
        )

    def notify(self) -> None:
        """For leases: one was closed."""
        with self._changed:
            self._changed.notify_all()

    def _is_ready_for(self, owner: str) -> bool:
        ending = any(lease.owner == owner and not lease.is_closed for lease in self._leases)
        return self._count(owner) > 0 and not ending

    def _count(self, owner: str) -> int:
        self._reclaim()
        config, num_free, num_others = self._config, len(self._free), self._num_others(owner)
        return blocks_to_lend(
            num_free, num_others, config.max_peers, config.staging_slots, self._num_returning()
        )

    def _num_returning(self) -> int:
        """Blocks of channels that have ended, of which the engine still has a piece."""
        ended = [lease for lease in self._leases if lease.is_closed and not lease.is_quarantined]
        return sum(len(lease.blocks) for lease in ended)

    def _num_others(self, owner: str) -> int:
        """Other peers that have a channel. A channel of `owner` that NCCL is slow to let go of does not keep
        its next one out, and one that is quarantined nobody's: else a peer that hung would lower the number
        of peers until a restart."""
        return len({lease.owner for lease in self._leases if not lease.is_over} - {owner})

    def _reclaim(self) -> None:
        for lease in [lease for lease in self._leases if lease.is_closed]:
            self._free += lease.take_unused()
            if not lease.blocks:
                self._leases.remove(lease)

    def _num_quarantined(self) -> int:
        return sum(len(lease.blocks) for lease in self._leases if lease.is_quarantined)

    def _full(self, owner: str) -> PhloemError:
        config, name = self._config, self._config.me.worker_id
        num_others = self._num_others(owner)
        if num_others >= config.max_peers:
            have = "1 channel has" if num_others == 1 else f"{num_others} channels have"
            return staging_full(
                f"{name} has staging memory for {_peers(config.max_peers)}, and {have} it: start it with a "
                f"higher --transfer-peers ({_mib(config.bytes_per_peer)} of its memory for each)"
            )
        lost = self._num_quarantined() * config.staging_bytes
        remedy = (
            f"start it again, lost channels keep {_mib(lost)} until then" if lost else "it is coming back"
        )
        return staging_full(
            f"{name} has staging memory for {_peers(config.max_peers)}, and channels that have ended hold "
            f"what is left of it: {remedy}"
        )


class StagingLease:
    """What one channel borrowed. Once it is closed, a block goes back when nobody refers to its slots any
    more: the engine may still have a piece to read, or a slot to fill, of a channel that has ended."""

    def __init__(self, pool: StagingPool, config: TransferConfig, owner: str, blocks: list[int]) -> None:
        self.owner = owner
        self.blocks = blocks
        self.is_closed = False
        self.is_quarantined = False
        self._holder: object = None
        self._pool = pool
        self._config = config
        self._slots: list[tuple[int, weakref.ref[StagingSlot]]] = []  # with their blocks

    @property
    def is_over(self) -> bool:
        """The channel has ended: what is left of it is memory."""
        return self.is_closed or self.is_quarantined

    @property
    def slot_bytes(self) -> int:
        """The largest slot that makes sense: a block, or half of the only one."""
        whole = self._config.staging_bytes
        half = whole // 2 // _ALIGNMENT * _ALIGNMENT
        wants_two = len(self.blocks) == 1 and self._config.staging_slots > 1
        return half if wants_two and half >= self._config.least_slot_bytes else whole

    def take_unused(self) -> list[int]:
        """For the pool, of a closed lease: its blocks that nobody uses any more."""
        if self.is_quarantined:
            return []
        used = {block for block, slot in self._slots if slot() is not None}
        unused = [block for block in self.blocks if block not in used]
        self.blocks = [block for block in self.blocks if block in used]
        return unused

    def slots(self, channel_name: str, slot_bytes: int, most: int) -> list[StagingSlot]:
        """At most `most` slots, and at most `staging_slots`, of the size that both sides agreed on; once.

        At least one: the size is no larger than our `slot_bytes`. What they leave of the lease goes back.
        """
        stride = _aligned(slot_bytes)
        per_block = max(1, self._config.staging_bytes // stride)
        count = min(most, self._config.staging_slots, per_block * len(self.blocks))
        num_blocks = -(-count // per_block)
        self.blocks, spare = self.blocks[:num_blocks], self.blocks[num_blocks:]
        self._pool.give_back(spare)
        places = [(block, n * stride) for block in self.blocks for n in range(per_block)][:count]
        slots = [
            StagingSlot(index, channel_name, self._pool.block(block)[start : start + slot_bytes])
            for index, (block, start) in enumerate(places)
        ]
        self._slots = [(block, weakref.ref(slot)) for (block, _), slot in zip(places, slots, strict=True)]
        return slots

    def quarantine(self, holder: object) -> None:
        """Before `close`: `holder` may touch the memory for as long as the process lives. So nobody else gets
        it, and `holder` is kept: to drop it might be to wait for it."""
        self._holder = holder
        self.is_quarantined = True
        self._pool.quarantined(self)

    def close(self) -> None:
        """The channel has ended: no thread of its own, and no peer, touches the memory any more, unless it is
        quarantined."""
        self.is_closed = True
        self._pool.notify()


def _peers(count: int) -> str:
    return "1 peer" if count == 1 else f"{count} peers"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.4g} MiB"


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT

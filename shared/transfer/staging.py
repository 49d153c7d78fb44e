"""Staging slots: the only memory that the transfer threads touch.

prefill:  free -> acquired (engine gathers) -> sent -> free            one credit from acquire to Credit
decode:   free -> receiving -> delivered (engine scatters) -> free     Credit returns on release

Where a device does all that, decode's slot is free when its scatter is queued: what fills it next waits for
that, on the device. Prefill's is free when the host has seen its bytes leave: a gather that waited for them
on the device would hold up those for other peers, and the steps, when its peer hangs.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from torch import Tensor

from phloem.shared.transfer.errors import protocol_violation
from phloem.shared.transfer.pending import Moved


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class StagingSlot:
    """`tensor` is uint8 [slot bytes] on the endpoint's device. It belongs to one channel; when that has ended
    and nobody refers to the slot, the `StagingPool` lends its memory to another one."""

    index: int
    channel_name: str
    tensor: Tensor


class SendRing:
    """The prefill side's slots and the credits that the decode side gave. Thread-safe.

    The methods that give something back return True when an `acquire` that failed would succeed now; they
    say so once for each failed `acquire`.
    """

    def __init__(self, slots: list[StagingSlot], credits: int) -> None:
        self._free = list(slots)
        self._acquired: set[int] = set()
        self._credits = credits
        self._num_leaving = 0  # pieces whose bytes are still in their slots
        self._num_uncredited = 0  # pieces announced for which no Credit came yet
        self._starved = False
        self._lock = threading.Lock()

    def acquire(self) -> StagingSlot | None:
        """Takes a slot and a credit, or None when either is short."""
        with self._lock:
            if not self._free or not self._credits:
                self._starved = True
                return None
            slot = self._free.pop()
            self._acquired.add(slot.index)
            self._credits -= 1
            return slot

    def give_back(self, slot: StagingSlot) -> bool:
        """An acquired slot is returned unsent."""
        with self._lock:
            self._leave(slot)
            self._free.append(slot)
            self._credits += 1
            return self._relieved()

    def announcing(self, num_pieces: int) -> None:
        """The peer is told of pieces, and may give their credits back before they are sent."""
        with self._lock:
            self._num_uncredited += num_pieces

    def sending(self, slot: StagingSlot) -> None:
        """An acquired slot goes on its way."""
        with self._lock:
            self._leave(slot)
            self._num_leaving += 1

    def sent(self, slot: StagingSlot) -> bool:
        """The bytes have left the slot."""
        with self._lock:
            self._num_leaving -= 1
            self._free.append(slot)
            return self._relieved()

    @property
    def is_idle(self) -> bool:
        """Every piece sent has left, and was taken by the peer's engine."""
        with self._lock:
            return self._num_leaving == 0 and self._num_uncredited == 0

    def credit(self, num_slots: int) -> bool:
        """Raises `transfer_protocol` when the peer credits what it was never told of."""
        with self._lock:
            if not 1 <= num_slots <= self._num_uncredited:
                raise protocol_violation(f"{num_slots} credits for {self._num_uncredited} pieces")
            self._num_uncredited -= num_slots
            self._credits += num_slots
            return self._relieved()

    def _leave(self, slot: StagingSlot) -> None:
        assert slot.index in self._acquired, "the slot is not acquired"
        self._acquired.remove(slot.index)

    def _relieved(self) -> bool:
        relieved = self._starved and bool(self._free) and self._credits > 0
        if relieved:
            self._starved = False
        return relieved


class ReceiveRing:
    """The decode side's slots, the one that was released first is filled first. Thread-safe."""

    def __init__(self, slots: list[StagingSlot]) -> None:
        self._free: deque[tuple[StagingSlot, Moved | None]] = deque((slot, None) for slot in slots)
        self._taken: set[int] = set()
        self._lock = threading.Lock()

    def take(self) -> tuple[StagingSlot, Moved | None]:
        """A slot, and what must be done before it is filled.

        Raises `transfer_protocol` when none is free: the peer sent without a credit.
        """
        with self._lock:
            if not self._free:
                raise protocol_violation("a piece came without a credit")
            slot, after = self._free.popleft()
            self._taken.add(slot.index)
            return slot, after

    def release(self, slot: StagingSlot, after: Moved | None) -> None:
        """The engine has launched what empties the slot: `after`, or nothing does."""
        with self._lock:
            assert slot.index in self._taken, "the slot was released twice"
            self._taken.remove(slot.index)
            self._free.append((slot, after))

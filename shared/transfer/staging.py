"""Staging slots: the only memory that the transfer threads touch.

prefill:  free -> acquired (engine gathers) -> sent -> free            one credit from acquire to Credit
decode:   free -> receiving -> delivered (engine scatters) -> free     Credit returns on release
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from torch import Tensor

from phloem.shared.transfer.errors import protocol_violation


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
        self._num_uncredited = 0  # pieces sent for which no Credit came yet
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

    def is_acquired(self, slot: StagingSlot) -> bool:
        """Not on its way yet."""
        with self._lock:
            return slot.index in self._acquired

    def sending(self, slot: StagingSlot) -> None:
        """An acquired slot goes on its way."""
        with self._lock:
            self._leave(slot)
            self._num_uncredited += 1

    def sent(self, slot: StagingSlot) -> bool:
        """The bytes have left the slot."""
        with self._lock:
            self._free.append(slot)
            return self._relieved()

    @property
    def is_idle(self) -> bool:
        """Every piece sent was taken by the peer's engine."""
        with self._lock:
            return self._num_uncredited == 0

    def credit(self, num_slots: int) -> bool:
        """Raises `transfer_protocol` when the peer credits what was never sent."""
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
    """The decode side's slots. Thread-safe."""

    def __init__(self, slots: list[StagingSlot]) -> None:
        self._free = list(slots)
        self._taken: set[int] = set()
        self._lock = threading.Lock()

    def take(self) -> StagingSlot:
        """Raises `transfer_protocol` when none is free: the peer sent without a credit."""
        with self._lock:
            if not self._free:
                raise protocol_violation("a piece came without a credit")
            slot = self._free.pop()
            self._taken.add(slot.index)
            return slot

    def releasing(self, slot: StagingSlot) -> None:
        """The engine has launched what empties the slot."""
        with self._lock:
            assert slot.index in self._taken, "the slot was released twice"
            self._taken.remove(slot.index)

    def emptied(self, slot: StagingSlot) -> None:
        """The device has emptied it; call it before the Credit leaves."""
        with self._lock:
            self._free.append(slot)

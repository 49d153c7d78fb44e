"""Damage on purpose, for proofs that damage is noticed.

Only who writes an engine's first frame can ask for it (tests and `benchmarks/check_pair.py` do): `Faults` is
no option, so that no flag, file or variable of a worker reaches it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from msgspec import Struct

from phloem.shared.transfer.events import PieceReceived, TransferEvent

log = logging.getLogger(__name__)

_BYTES_WITHIN_S = 10.0


class Faults(Struct, frozen=True, kw_only=True):
    """`corrupt_pieces`: of which of the pieces that arrive here, counted from 0 over all channels, one byte
    is altered in its staging slot, after the bytes came and before anybody reads them."""

    corrupt_pieces: tuple[int, ...] = ()


def damaging(faults: Faults, deliver: Callable[[TransferEvent], None]) -> Callable[[TransferEvent], None]:
    """`deliver`, behind the damage that `faults` asks for; `deliver` itself when there is none."""
    if not faults.corrupt_pieces:
        return deliver
    log.warning("this engine alters KV that it receives, as its start asked for: %s", faults)
    return _Corruptor(faults.corrupt_pieces, deliver)


class _Corruptor:
    """Called from all of the endpoint's threads; each channel has one that delivers pieces."""

    def __init__(self, numbers: tuple[int, ...], deliver: Callable[[TransferEvent], None]) -> None:
        self._left = set(numbers)
        self._deliver = deliver
        self._count = 0

    def __call__(self, event: TransferEvent) -> None:
        if isinstance(event, PieceReceived):
            number, self._count = self._count, self._count + 1
            if number in self._left:
                self._alter(event)
        self._deliver(event)

    @staticmethod
    def _alter(piece: PieceReceived) -> None:
        if piece.incoming is not None:
            piece.incoming.wait(_BYTES_WITHIN_S)
        # Reading it back waits for the device: whatever the engine launches comes after.
        piece.data[piece.data.numel() // 2] ^= 0x10
        log.warning(
            "altered a byte of a piece of %s: now %d",
            piece.header.request_id,
            int(piece.data[piece.data.numel() // 2]),
        )

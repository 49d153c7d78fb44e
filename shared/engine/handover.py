"""What both sides of a hand-over share: the channel and the pages as they see them, and how one ends."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from phloem.shared.engine.kv_pool import OwnerKey
from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Admitted, Cancel, Last, Piece, Ready
from phloem.shared.transfer.events import PieceReceived, Side
from phloem.shared.transfer.pending import Incoming, Moved
from phloem.shared.transfer.staging import StagingSlot

_MAX_REMEMBERED = 8192


class Channels(Protocol):
    """The part of `TransferEndpoint` that hand-overs use."""

    def is_open(self, peer: PeerRef, side: Side) -> bool: ...
    def acquire_slot(self, peer: PeerRef) -> StagingSlot | None: ...
    def announce(self, peer: PeerRef, pieces: Sequence[Piece], slots: Sequence[StagingSlot]) -> None: ...
    def send_piece(self, peer: PeerRef, piece: Piece, slot: StagingSlot, gathered: Moved) -> None: ...
    def send_last(self, peer: PeerRef, message: Last) -> None: ...
    def send_ready(self, peer: PeerRef, message: Ready) -> None: ...
    def send_admitted(self, peer: PeerRef, message: Admitted) -> None: ...
    def send_cancel(self, peer: PeerRef, message: Cancel, side: Side) -> None: ...
    def release(self, piece: PieceReceived, after: Moved | None = None) -> None: ...


class PageStore(Protocol):
    """The KV tensors behind page ids. Pages move beside the engine's steps, not in their order: whoever gives
    pages away that may still be on the move calls `fence` or `withdraw` first."""

    num_layers: int
    layer_page_bytes: int  # K and V of one page in one layer

    def gather(
        self, page_ids: Sequence[int], layer_start: int, layer_end: int, out: Tensor, beside: int = 0
    ) -> Moved:
        """Copies pages, computed by now, into the first bytes of `out` (uint8), while `beside` bytes cross
        the link: it takes no more of the device than it needs to be over by then. 0: nothing crosses before
        it is."""

    def scatter(
        self,
        page_ids: Sequence[int],
        layer_start: int,
        layer_end: int,
        data: Tensor,
        after: Incoming | None = None,
        beside: int = 0,
    ) -> Moved:
        """Copies `data` (uint8) into pages, when `after` is there; `beside` as in `gather`."""

    def fence(self) -> None:
        """Steps launched from now on begin, on the device, when all that is gathered by now is gathered."""

    def withdraw(self, scatters: Iterable[Moved]) -> None:
        """Those of them whose bytes have not come will write nothing. Steps launched from now on begin, on
        the device, when the others are over."""


class Ended(NamedTuple):
    """A hand-over that came to an end on this side, well (`error` is None) or not."""

    key: OwnerKey
    error: ErrorInfo | None


class RecentKeys:
    """Remembers the last few thousand ended keys, so that a late message is known to be late, not early."""

    def __init__(self) -> None:
        self._keys: OrderedDict[OwnerKey, None] = OrderedDict()

    def add(self, key: OwnerKey) -> None:
        self._keys[key] = None
        if len(self._keys) > _MAX_REMEMBERED:
            self._keys.popitem(last=False)

    def __contains__(self, key: OwnerKey) -> bool:
        return key in self._keys

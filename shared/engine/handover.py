"""What both sides of a hand-over share: the shape of the KV that moves, and how it is cut into pieces."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from phloem.shared.engine.kv_pool import OwnerKey
from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Cancel, Last, Piece, Ready
from phloem.shared.transfer.events import PieceReceived, Side
from phloem.shared.transfer.staging import StagingSlot

_MAX_REMEMBERED = 8192


class Channels(Protocol):
    """The part of `TransferEndpoint` that hand-overs use."""

    def is_open(self, peer: PeerRef, side: Side) -> bool: ...
    def acquire_slot(self, peer: PeerRef) -> StagingSlot | None: ...
    def send_piece(self, peer: PeerRef, piece: Piece, slot: StagingSlot) -> None: ...
    def send_last(self, peer: PeerRef, message: Last) -> None: ...
    def send_ready(self, peer: PeerRef, message: Ready) -> None: ...
    def send_cancel(self, peer: PeerRef, message: Cancel, side: Side) -> None: ...
    def release(self, piece: PieceReceived) -> None: ...


class PageStore(Protocol):
    """The KV tensors behind page ids; ordered after the steps launched before."""

    num_layers: int
    layer_page_bytes: int  # K and V of one page in one layer

    def gather(self, page_ids: Sequence[int], layer_start: int, layer_end: int, out: Tensor) -> int:
        """Copies pages into `out` (uint8); returns their digest."""

    def scatter(self, page_ids: Sequence[int], layer_start: int, layer_end: int, data: Tensor) -> int:
        """Copies `data` (uint8) into pages; returns its digest."""


class Span(NamedTuple):
    """Pages [page_start, page_start + num_pages) of a request, layers [layer_start, layer_end)."""

    page_start: int
    num_pages: int
    layer_start: int
    layer_end: int


class Ended(NamedTuple):
    """A hand-over that came to an end on this side, well (`error` is None) or not."""

    key: OwnerKey
    error: ErrorInfo | None


def next_span(
    store: PageStore, slot_bytes: int, page: int, layer: int, num_pages: int
) -> tuple[Span, int, int]:
    """The next piece from (page, layer) on, with pages below `num_pages`, and where the one after it starts.

    As many whole pages as fit go together; a page that is larger than the slot goes in groups of layers.
    """
    whole_pages = slot_bytes // (store.layer_page_bytes * store.num_layers)
    if whole_pages and layer == 0:
        count = min(whole_pages, num_pages - page)
        return Span(page, count, 0, store.num_layers), page + count, 0
    layers = max(1, slot_bytes // store.layer_page_bytes)
    layer_end = min(store.num_layers, layer + layers)
    done = layer_end == store.num_layers
    return Span(page, 1, layer, layer_end), page + done, 0 if done else layer_end


def span_bytes(store: PageStore, span: Span) -> int:
    return span.num_pages * (span.layer_end - span.layer_start) * store.layer_page_bytes


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

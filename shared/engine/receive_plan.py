"""What the decode side knows of one hand-over."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from phloem.shared.engine.kv_pool import OwnerKey
from phloem.shared.engine.page_layers import PageLayers
from phloem.shared.engine.requests import Request
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Last
from phloem.shared.transfer.events import PieceReceived
from phloem.shared.transfer.pending import Moved

_LAST_PIECES = 2  # one is scattered while the other one crosses


class Scattering(NamedTuple):
    """A piece on its way into pages."""

    moved: Moved
    piece: PieceReceived

    @property
    def is_over(self) -> bool:
        """Both digests are known."""
        return self.piece.digest is not None and self.moved.done()


class ReceivePlan:
    """One request whose KV comes, from its pages to its admission."""

    def __init__(self, request: Request, peer: PeerRef, num_layers: int, now_s: float) -> None:
        self.request = request
        self.peer = peer
        self.num_held_pages = request.num_tree_pages
        self.arrived = PageLayers(len(request.page_ids), num_layers, request.num_tree_pages)
        self.announced = False
        self.since_s = now_s  # reserved, then announced
        self.first_piece_s = 0.0
        self.last_piece_s = 0.0
        self.num_pieces = 0
        self.scattering: deque[Scattering] = deque()
        self.last: Last | None = None

    @property
    def key(self) -> OwnerKey:
        return self.request.key

    @property
    def is_landing(self) -> bool:
        """Only bytes are missing, of its last pieces: a fraction of a millisecond."""
        if self.last is None or len(self.scattering) > _LAST_PIECES:
            return False
        return all(item.piece.digest is not None for item in self.scattering)

    @property
    def has_come(self) -> bool:
        """Nothing of it is still on its way from the sender."""
        return self.last is not None and all(item.piece.has_come for item in self.scattering)

"""What the prefill side knows of one hand-over."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from phloem.shared.engine.exposure import SendTimes
from phloem.shared.engine.page_layers import PageLayers, Span
from phloem.shared.engine.requests import Request
from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Piece
from phloem.shared.transfer.pending import DONE, Pending


class Chunk:
    """What one launched step computes of a request: afterwards the KV of its first `num_tokens` tokens, in
    `num_pages` pages, is there. `marks`: of the layer groups launched, those that were not sent yet."""

    def __init__(self, num_tokens: int, num_pages: int) -> None:
        self.num_tokens = num_tokens
        self.num_pages = num_pages
        self.marks: deque[tuple[int, Pending]] = deque()
        self.is_sent = False

    def is_computed(self, num_layers: int) -> bool:
        """All of its layers; nothing has gone of it."""
        groups = self.marks
        return bool(groups) and groups[-1][0] == num_layers and all(mark.done() for _, mark in groups)


class Draft(NamedTuple):
    """A piece that is planned and has no slot yet."""

    piece: Piece
    span: Span
    before: int  # bytes of the piece that crosses meanwhile


class SendPlan:
    """One request that is handed over, from its submission to its end."""

    def __init__(self, request: Request, peer: PeerRef, now_s: float) -> None:
        self.request = request
        self.peer = peer
        self.times = SendTimes(now_s)
        self.gone: PageLayers | None = None  # what was sent, of all pages; None until decode is ready
        self.chunks: deque[Chunk] = deque()
        self.drafts: list[Draft] = []  # of the first pieces, for a decode that holds no page of it
        self.num_launched_tokens = 0
        self.num_pieces = 0
        self.latest_piece_bytes = 0
        self.made: list[int] | None = None  # the tokens made here, once the prompt is computed
        self.error: ErrorInfo | None = None

    @property
    def is_ready(self) -> bool:
        return self.gone is not None

    @property
    def is_sent(self) -> bool:
        """The whole prompt is computed, and all of it that decode lacks has gone."""
        return self.made is not None and self.gone is not None and not self.chunks and self.gone.is_complete

    def whole(self, num_layers: int) -> Chunk | None:
        """All of its chunks as one, which they are from now on: nothing has gone of them, and all is
        computed. None when some of it is not."""
        if not self.chunks or not all(chunk.is_computed(num_layers) for chunk in self.chunks):
            return None
        whole = Chunk(self.chunks[-1].num_tokens, self.chunks[-1].num_pages)
        whole.marks.append((num_layers, DONE))
        self.chunks = deque([whole])
        return whole

    def recompute(self) -> None:
        """It was retracted: what was computed of it is gone."""
        self.chunks.clear()
        self.drafts = []

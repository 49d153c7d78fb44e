"""How far each page of one request has gone through a hand-over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Span(NamedTuple):
    """Pages [page_start, page_start + num_pages) of a request, layers [layer_start, layer_end)."""

    page_start: int
    num_pages: int
    layer_start: int
    layer_end: int

    def of(self, page_ids: Sequence[int]) -> Sequence[int]:
        """The ids of its pages among all of the request's."""
        return page_ids[self.page_start : self.page_start + self.num_pages]

    def layers_of_pages(self) -> int:
        """How many layers of pages it has."""
        return self.num_pages * (self.layer_end - self.layer_start)

    def head(self, num_bytes: int, layer_page_bytes: int) -> Span:
        """Its first pages, as many as `num_bytes` hold; of a page that is larger its first layers."""
        num_pages = num_bytes // (layer_page_bytes * (self.layer_end - self.layer_start))
        if num_pages:
            return self._replace(num_pages=min(num_pages, self.num_pages))
        num_layers = max(1, num_bytes // layer_page_bytes)
        return self._replace(num_pages=1, layer_end=self.layer_start + num_layers)


class PageLayers:
    """For each page the number of its first layers that have gone; the first `num_held` pages need nothing.

        page     0 . . . . . . . .
        layers   4 4 4 4 2 2 2 0 0      four layers: pages 0 to 3 are complete, 7 and 8 untouched

    Both sides keep one. Each layer of each page goes exactly once, a page's layers in ascending order. What
    goes next begins at the first page that is not complete, or where the span before it began or ended.
    """

    def __init__(self, num_pages: int, num_layers: int, num_held: int) -> None:
        self.num_layers = num_layers
        self._gone: npt.NDArray[np.int32] = np.zeros(num_pages, dtype=np.int32)
        self._gone[:num_held] = num_layers
        self._latest: Span | None = None

    @property
    def is_complete(self) -> bool:
        return bool((self._gone == self.num_layers).all())

    def next_run(self, num_pages: int, layer_end: int) -> Span | None:
        """Of the layers below `layer_end` of the first `num_pages` pages what goes next, in one or several
        spans: neighbouring pages that have come equally far. None: all have gone."""
        gone = self._gone[:num_pages]
        lacking = gone < layer_end
        if not lacking.any():
            return None
        page = int(lacking.argmax())
        first = int(gone[page])
        unlike = gone[page:] != first
        count = int(unlike.argmax()) or len(unlike)
        return Span(page, count, first, layer_end)

    def accepts(self, span: Span) -> bool:
        """Whether the span is just what its pages lack next."""
        if span.num_pages < 1 or span.page_start < 0 or span.page_start + span.num_pages > len(self._gone):
            return False
        if not 0 <= span.layer_start < span.layer_end <= self.num_layers:
            return False
        return self._is_in_order(span) and bool((self._range(span) == span.layer_start).all())

    def note(self, span: Span) -> None:
        """The span has gone."""
        assert self.accepts(span), "a layer of a page goes once, and in order"
        self._range(span)[:] = span.layer_end
        self._latest = span

    def _is_in_order(self, span: Span) -> bool:
        latest = self._latest
        if latest is not None and span.page_start in (
            latest.page_start,
            latest.page_start + latest.num_pages,
        ):
            return True
        return span.page_start == int((self._gone < self.num_layers).argmax())

    def _range(self, span: Span) -> npt.NDArray[np.int32]:
        return self._gone[span.page_start : span.page_start + span.num_pages]

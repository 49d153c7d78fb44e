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

    def lacks(self, num_pages: int, layer_end: int) -> bool:
        """Whether layers below `layer_end` of the first `num_pages` pages have not all gone."""
        return bool((self._gone[:num_pages] < layer_end).any())

    def num_lacking(self, num_pages: int, layer_end: int) -> int:
        """Of all that `lacks` speaks of, the number of layers of pages."""
        return int((layer_end - self._gone[:num_pages]).clip(min=0).sum())

    def next_span(self, num_pages: int, layer_end: int, slot_bytes: int, layer_page_bytes: int) -> Span:
        """What goes next of that which `lacks` speaks of, as much as fits into a slot.

        Neighbouring pages that have come equally far go together, all their layers up to `layer_end`; a page
        whose layers are larger than the slot goes alone, by groups of layers.
        """
        page = int((self._gone[:num_pages] < layer_end).argmax())
        first = int(self._gone[page])
        pages = slot_bytes // (layer_page_bytes * (layer_end - first))
        if not pages:
            return Span(page, 1, first, first + max(1, slot_bytes // layer_page_bytes))
        like_it = self._gone[page : min(num_pages, page + pages)] == first
        count = len(like_it) if like_it.all() else int(like_it.argmin())
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

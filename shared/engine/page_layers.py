"""How far each page of one request has gone through a hand-over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


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
            return Span(self.page_start, min(num_pages, self.num_pages), self.layer_start, self.layer_end)
        num_layers = max(1, num_bytes // layer_page_bytes)
        return Span(self.page_start, 1, self.layer_start, self.layer_start + num_layers)


class PageLayers:
    """For each page the number of its first layers that have gone; the first `num_held` pages need nothing.

        page     0 . . . . . . . .
        layers   4 4 4 4 2 2 2 0 0      four layers: pages 0 to 3 are complete, 7 and 8 untouched

    Both sides keep one. Each layer of each page goes exactly once, a page's layers in ascending order. What
    goes next begins where pages begin that have come equally far.
    """

    def __init__(self, num_pages: int, num_layers: int, num_held: int) -> None:
        self.num_layers = num_layers
        self._num_pages = num_pages
        # Neighbours that have come equally far are one run, and there are few of them: (first page, layers).
        self._runs: list[tuple[int, int]] = []
        _append(self._runs, 0, min(num_held, num_pages), num_layers)
        _append(self._runs, num_held, num_pages, 0)

    @property
    def is_complete(self) -> bool:
        return all(gone == self.num_layers for _, gone in self._runs)

    @property
    def num_left(self) -> int:
        """Layers of pages that have not gone."""
        return sum(
            (self.num_layers - gone) * (self._end(index) - start)
            for index, (start, gone) in enumerate(self._runs)
        )

    def next_run(self, num_pages: int, layer_end: int) -> Span | None:
        """Of the layers below `layer_end` of the first `num_pages` pages what goes next, in one or several
        spans: neighbouring pages that have come equally far. None: all have gone."""
        for index, (start, gone) in enumerate(self._runs):
            if gone < layer_end and start < num_pages:
                return Span(start, min(self._end(index), num_pages) - start, gone, layer_end)
        return None

    def accepts(self, span: Span) -> bool:
        """Whether the span is just what its pages lack next."""
        if span.num_pages < 1 or span.page_start < 0 or span.page_start + span.num_pages > self._num_pages:
            return False
        if not 0 <= span.layer_start < span.layer_end <= self.num_layers:
            return False
        return any(
            start == span.page_start
            and span.page_start + span.num_pages <= self._end(index)
            and gone == span.layer_start
            for index, (start, gone) in enumerate(self._runs)
        )

    def note(self, span: Span) -> None:
        """The span has gone: one that is accepted, such as the head of a next run."""
        first, after = span.page_start, span.page_start + span.num_pages
        runs: list[tuple[int, int]] = []
        for index, (start, gone) in enumerate(self._runs):
            end = self._end(index)
            if end <= first or start >= after:
                _append(runs, start, end, gone)
                continue
            assert gone == span.layer_start, "a layer of a page goes once, and in order"
            _append(runs, start, first, gone)
            _append(runs, max(start, first), min(end, after), span.layer_end)
            _append(runs, after, end, gone)
        self._runs = runs

    def _end(self, index: int) -> int:
        """Of a run."""
        return self._runs[index + 1][0] if index + 1 < len(self._runs) else self._num_pages


def _append(runs: list[tuple[int, int]], start: int, end: int, gone: int) -> None:
    """To what comes before `start`; nothing when the run is empty."""
    if start < end and (not runs or runs[-1][1] != gone):
        runs.append((start, gone))

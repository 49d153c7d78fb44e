"""The usual step: the same requests decode as in the step before, each one token further.

Nothing is asked of each request then; only a row whose next token lies past its last page gets another.

    positions   |------ KV written by steps before ------|x|            x: this step's token
    rooms       |--- pages ---|--- pages ---|--- pages ---|             a row at its room needs a page
"""

from __future__ import annotations

import numpy as np

from phloem.shared.engine.page_account import PageAccount
from phloem.shared.engine.requests import Request
from phloem.shared.engine.step_plan import DecodeStep


class SteadyDecodes:
    """Continues a decode step in which every running request had a row, for as long as nobody joins, leaves
    or reaches its limit. Page ids of running requests never change, so `rooms` only ever grows."""

    def __init__(self, step: DecodeStep, account: PageAccount) -> None:
        """`step` is planned: its requests count its tokens already."""
        self._account = account
        self._batch = step.batch
        self._positions = step.positions
        self._size = account.tree.page_size
        requests = step.batch.requests
        rooms = (len(request.page_ids) * self._size for request in requests)
        self._rooms = np.fromiter(rooms, np.int64, len(requests))
        self._steps_left = min(request.token_limit - request.num_known_tokens for request in requests)

    def next(self) -> DecodeStep | None:
        """The next step, with its pages; None when it isn't like the one before."""
        if self._steps_left <= 0:
            return None
        positions = self._positions + 1
        grown: list[int] = np.flatnonzero(positions >= self._rooms).tolist()
        requests = self._batch.requests
        for row in grown:
            if not self._account.grow(requests[row], int(positions[row]) + 1):
                return None
            self._rooms[row] = len(requests[row].page_ids) * self._size
        self._positions = positions
        self._steps_left -= 1
        return DecodeStep(self._batch, positions, _host_tokens(requests), grown)


def _host_tokens(requests: list[Request]) -> list[int] | None:
    """All rows were in the step before: its tokens are known of all of them, or of none."""
    if requests[0].num_pending:
        return None
    return [request.token_ids[-1] for request in requests]

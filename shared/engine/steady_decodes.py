"""The usual step: the same requests decode as in the step before, each one token further.

Nothing is asked of each request then, and nothing is noted in it but the tokens that come back: after the
device has computed for 20 ms, a request is no longer in the CPU's caches, and one look at each of 256 costs
more than all else of the step. How far they have got is counted once for all. Only a row whose next token
lies past its last page gets another.

    positions   |------ KV written by steps before ------|x|            x: this step's token
    rooms       |--- pages ---|--- pages ---|--- pages ---|             a row at its room needs a page
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from phloem.shared.engine.page_account import PageAccount
from phloem.shared.engine.running_set import RunningSet
from phloem.shared.engine.step_plan import DecodeStep, StepPlan


class SteadyDecodes:
    """Continues a decode step in which every running request had a row, for as long as nobody joins, leaves
    or reaches its limit. Page ids of running requests never change, so `rooms` only ever grows."""

    def __init__(self, step: DecodeStep, account: PageAccount) -> None:
        """`step` is planned: its requests count its tokens already."""
        self._account = account
        self._batch = step.batch
        self._positions = step.positions
        self._size = account.tree.page_size
        self._num_launched = self._num_collected = 0  # steps that the requests' own counts know nothing of
        requests = step.batch.requests
        rooms = (len(request.page_ids) * self._size for request in requests)
        self._rooms = np.fromiter(rooms, np.int64, len(requests))
        self._shortest = min(requests, key=lambda request: request.token_limit - request.num_known_tokens)
        self._steps_left = self._shortest.token_limit - self._shortest.num_known_tokens
        self._token_lists = [request.token_ids for request in requests]

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
        return DecodeStep(self._batch, positions, self._host_tokens(), grown)

    def launched(self) -> None:
        """What `next` gave will be launched: `StepPlan.count` for all rows at once."""
        self._num_launched += 1

    def collected(self, step: DecodeStep, token_ids: list[int]) -> bool:
        """Appends a step's tokens to its requests, none of which has ended; False, and nothing is done, when
        one may end with its token, or the step is of another batch."""
        last = len(self._shortest.token_ids) + 1 >= self._shortest.token_limit
        if step.batch is not self._batch or last or not self._stops.isdisjoint(token_ids):
            return False
        for known, token_id in zip(self._token_lists, token_ids, strict=True):
            known.append(token_id)
        self._num_collected += 1
        return True

    def settle(self) -> None:
        """Brings the requests' own counts up to date."""
        computed, ahead = self._num_launched, self._num_launched - self._num_collected
        if not computed and not ahead:
            return
        self._num_launched = self._num_collected = 0
        for request in self._batch.requests:
            request.num_computed_tokens += computed
            request.num_in_flight += ahead
            request.num_pending += ahead

    @cached_property
    def _stops(self) -> frozenset[int]:
        """Tokens that end some request."""
        return frozenset().union(*[request.stop_token_ids for request in self._batch.requests])

    def _host_tokens(self) -> list[int] | None:
        """All rows were in the step before: its tokens are known of all of them, or of none."""
        if self._batch.requests[0].num_pending + self._num_launched > self._num_collected:
            return None
        return [known[-1] for known in self._token_lists]


class SteadyRun:
    """Steady steps for as long as there are any. Whoever looks at how far a request is calls `settle` before;
    the scheduler does, wherever it gives requests away or asks them."""

    def __init__(self, running: RunningSet, account: PageAccount) -> None:
        self._running = running
        self._account = account
        self._decodes: SteadyDecodes | None = None  # the step before was of these
        self._version = 0  # of the running set then

    def next(self) -> StepPlan | None:
        """The next step, when it is like the one before."""
        decodes = self._unchanged()
        step = decodes.next() if decodes is not None else None
        return None if step is None else StepPlan.of_decodes(step)

    def launched(self) -> None:
        """What `next` gave will be launched."""
        assert self._decodes is not None
        self._decodes.launched()

    def begin(self, plan: StepPlan) -> None:
        """A step that is not `next`'s, and is counted: others may go on from it if all that run decode."""
        self.drop()
        step = plan.decode
        if step is None or plan.num_rows != len(self._running):
            return
        if all(request.phase == "both" for request in step.batch.requests):
            self._decodes, self._version = SteadyDecodes(step, self._account), self._running.version

    def collected(self, plan: StepPlan, token_ids: list[int]) -> bool:
        """Whether all that is to be done with a step's tokens was to append them, and it is done."""
        step, decodes = plan.decode, self._unchanged()
        return step is not None and decodes is not None and decodes.collected(step, token_ids)

    def settle(self) -> None:
        if self._decodes is not None:
            self._decodes.settle()

    def drop(self) -> None:
        self.settle()
        self._decodes = None

    def _unchanged(self) -> SteadyDecodes | None:
        """None when the running set is not what it was."""
        return self._decodes if self._version == self._running.version else None

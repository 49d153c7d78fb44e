"""Which waiting requests get pages and a slot: in order, while they fit; one that doesn't may be passed."""

from __future__ import annotations

from typing import NamedTuple

from phloem.shared.engine.limits import Limits
from phloem.shared.engine.page_account import PageAccount
from phloem.shared.engine.requests import Request, Status
from phloem.shared.engine.running_set import RunningSet, Slots
from phloem.shared.engine.step_plan import Row, chunk_row
from phloem.shared.engine.waiting_queue import WaitingQueue
from phloem.shared.errors import ErrorInfo, PhloemError

MAX_PASSES = 64  # a waiting request that doesn't fit is overtaken at most this often
MAX_BLOCKED = (
    64  # so many that don't fit are looked at in one step: a long queue must not cost a step its time
)
HEADROOM_TOKENS = 64  # room to generate that admission asks for beyond the prompt


class Refusal(NamedTuple):
    request: Request
    error: ErrorInfo


class Admitted(NamedTuple):
    """rows: first chunks of requests that start to run. reserved: requests that got pages for KV from a
    peer. refused: can never run here; they still wait. short_of_pages: one was left waiting for pages."""

    rows: list[Row]
    reserved: list[Request]
    refused: list[Refusal]
    short_of_pages: bool


class Admission:
    """Moves requests from the queue to the running set."""

    def __init__(
        self, limits: Limits, account: PageAccount, waiting: WaitingQueue, running: RunningSet, slots: Slots
    ) -> None:
        self._limits = limits
        self._account = account
        self._waiting = waiting
        self._running = running
        self._slots = slots

    def admit(self, budget: int) -> Admitted:
        """Starts waiting requests; their chunks take at most `budget` tokens."""
        rows: list[Row] = []
        reserved: list[Request] = []
        refused: list[Refusal] = []
        blocked: list[Request] = []
        for request in self._candidates():
            if not self._slots.num_free or self._must_wait_for(blocked):
                break
            if request.num_in_flight or request.awaits_grammar:
                continue
            if budget == 0 and request.phase != "decode":
                continue
            error = self._too_long(request)
            if error is not None:
                refused.append(Refusal(request, error))
            elif not self._reserve(request):
                blocked.append(request)
            else:
                self._start(request)
                if request.status is Status.RECEIVING:
                    reserved.append(request)
                else:
                    rows.append(chunk_row(request, budget))
                    budget -= rows[-1].num_tokens
                for passed in blocked:
                    passed.times_passed += 1
        return Admitted(rows, reserved, refused, bool(blocked))

    def check_size(self, request: Request) -> None:
        """Raises `PhloemError` when the request's tokens are more than the pool holds."""
        needed = self._account.pages_for(len(request.token_ids) + 1)
        total = self._account.pool.num_pages
        if needed > total:
            raise PhloemError(
                "kv_pool_too_small",
                f"{len(request.token_ids)} tokens need {needed} KV pages and this worker has {total}: send a "
                "shorter prompt, or start the worker with a larger --max-total-tokens",
                http_status=400,
                param="prompt",
            )

    # -- inside ----------------------------------------------------------------------------------------

    def _candidates(self) -> list[Request]:
        if not len(self._waiting) or not self._slots.num_free:
            return []
        if self._limits.longest_prefix_first:
            return self._waiting.by_longest_prefix()
        return self._waiting.in_order()

    def _must_wait_for(self, blocked: list[Request]) -> bool:
        return len(blocked) >= MAX_BLOCKED or any(r.times_passed >= MAX_PASSES for r in blocked)

    def _reserve(self, request: Request) -> bool:
        """Borrows the request's prefix and allocates pages for the rest of its known tokens, if there is
        also room to generate and a page of growth for every running request."""
        known = len(request.token_ids)
        # The last token is computed here in any case, unless all KV comes from a peer.
        self._account.borrow_prefix(request, known if request.phase == "decode" else known - 1)
        room = 0 if request.phase == "prefill" else HEADROOM_TOKENS
        headroom = min(max(request.token_limit, known), known + room)
        wanted = self._account.pages_for(headroom) - len(request.page_ids) + len(self._running)
        fits = wanted <= self._account.num_available_pages or not len(self._running)
        if not fits or not self._account.grow(request, known):
            self._account.return_prefix(request)
            return False
        return True

    def _start(self, request: Request) -> None:
        self._waiting.remove(request)
        self._slots.take(request)
        request.times_passed = 0
        if request.phase == "decode":
            request.status = Status.RECEIVING
            return
        if not request.admitted_s:  # after a retraction it finds its own pages
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        request.status = Status.RUNNING
        self._running.add(request)

    def _too_long(self, request: Request) -> ErrorInfo | None:
        try:
            self.check_size(request)
        except PhloemError as error:
            return error.info
        return None

"""Which tokens of which requests the next step computes.

There is no prefill scheduler and no decode scheduler: computed tokens catch up with known tokens, within a
budget of tokens per step; chunked prefill falls out of that. Life of a request here:

    submit -> WAITING -> RUNNING -> ENDED                    (phase "both": all on this engine)
                      -> RUNNING -> SENDING -> ENDED         (phase "prefill": token 0, then hand-over)
                      -> RECEIVING -> RUNNING -> ENDED       (phase "decode": pages reserved, KV arrives)
    RUNNING -> RETRACTED -> WAITING when pages run out, youngest first; it is resumed, never failed.

Pages and slots come back only when no launched step uses them (`num_in_flight == 0`), because in the
overlap loop a step is planned before the results of the one before are known. No torch, clock or socket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from phloem.shared.engine.kv_pool import OwnerKey
from phloem.shared.engine.page_account import PageAccount
from phloem.shared.engine.requests import Request, Row, Status, StepPlan
from phloem.shared.errors import ErrorInfo, PhloemError, overloaded
from phloem.shared.protocol.session import FinishReason

MAX_PASSES = 64  # a waiting request that doesn't fit is overtaken at most this often
HEADROOM_TOKENS = 64  # room to generate that admission asks for beyond the prompt
MAX_LPM_QUEUE = 128  # a longer queue is served first come, first served: matching it all costs too much


class Limits(NamedTuple):
    max_step_tokens: int
    max_slots: int
    max_queued: int
    longest_prefix_first: bool = False


class Refusal(NamedTuple):
    request: Request
    error: ErrorInfo


class Scheduled(NamedTuple):
    """`reserved`: requests that just got pages for KV from a peer. `refused`: can never run here."""

    plan: StepPlan
    reserved: list[Request]
    refused: list[Refusal]


class Made(NamedTuple):
    """A token that a collected step made; `finish_reason` when it is the request's last."""

    request: Request
    token_id: int
    finish_reason: FinishReason | None


class Scheduler:
    """Owns the queues and the slots; asks `PageAccount` for pages."""

    def __init__(self, limits: Limits, account: PageAccount) -> None:
        self._limits = limits
        self._account = account
        self._waiting: deque[Request] = deque()
        self._running: dict[OwnerKey, Request] = {}
        self._requests: dict[OwnerKey, Request] = {}  # all that are not ended, and ended ones in flight
        self._free_slots = list(range(limits.max_slots - 1, -1, -1))
        self.num_retractions = 0
        self.short_of_pages = False  # the last plan left a request waiting for pages

    # -- what there is ---------------------------------------------------------------------------------

    def get(self, key: OwnerKey) -> Request | None:
        """The live request of this key; None when it is unknown or ended."""
        request = self._requests.get(key)
        return None if request is None or request.status is Status.ENDED else request

    def requests(self) -> list[Request]:
        """Everything that may hold pages, ended requests of launched steps included."""
        return list(self._requests.values())

    def live_requests(self) -> list[Request]:
        return [request for request in self._requests.values() if request.status is not Status.ENDED]

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_queued_tokens(self) -> int:
        """Known tokens not yet computed, of waiting and running requests."""
        groups: tuple[Iterable[Request], ...] = (self._waiting, self._running.values())
        return sum(len(request.token_ids) - request.num_computed_tokens for g in groups for request in g)

    # -- what comes in ---------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queues a request. Raises `PhloemError`: a duplicate, a full queue, or one too long for the pool."""
        if request.key in self._requests:
            raise PhloemError("duplicate_request", f"request {request.request_id} is already here")
        if len(self._waiting) >= self._limits.max_queued:
            raise overloaded(
                f"{len(self._waiting)} requests wait already; try again later", code="queue_full"
            )
        self._check_size(request)
        self._requests[request.key] = request
        self._waiting.append(request)

    def end(self, request: Request) -> None:
        """Ends a request in whatever state it is; its pages come back once no launched step uses them."""
        if request.status is Status.ENDED:
            return
        if request.status is Status.WAITING:
            self._waiting.remove(request)
        self._running.pop(request.key, None)
        request.status = Status.ENDED
        self._settle(request)

    def received(self, request: Request, token_ids: list[int]) -> None:
        """All KV of a RECEIVING request is in its pages: it joins the running batch with the tokens that the
        prefill worker made. From here on it is like any other, also when it is retracted."""
        assert request.status is Status.RECEIVING
        request.num_computed_tokens = len(request.token_ids)
        request.token_ids += token_ids
        request.num_submitted_tokens += len(token_ids)  # made elsewhere
        request.phase = "both"
        request.status = Status.RUNNING
        self._running[request.key] = request
        self._account.share_prefix(request)

    # -- a step ----------------------------------------------------------------------------------------

    def schedule(self) -> Scheduled:
        """Plans a step and counts it as launched.

        Decode rows first (one token each), then prompt chunks of running requests, then new requests,
        until the token budget is used. Every row's pages are allocated.
        """
        rows: dict[OwnerKey, Row] = {}
        budget = self._plan_decodes(rows)
        budget = self._plan_chunks(rows, budget)
        reserved, refused = self._admit(rows, budget)
        for row in rows.values():
            row.request.num_computed_tokens += row.num_tokens
            row.request.num_in_flight += 1
            row.request.num_pending += row.samples
        return Scheduled(StepPlan(list(rows.values())), reserved, refused)

    def launched(self, plan: StepPlan) -> None:
        """The device was given the step: later steps may read the KV of its prompt chunks."""
        for row in plan.rows:
            if row.num_tokens > 1:
                self._account.share_prefix(row.request)

    def collect(self, plan: StepPlan, token_ids: list[int]) -> list[Made]:
        """Takes a finished step's tokens, one for each row that samples, in order of the rows."""
        made: list[Made] = []
        tokens = iter(token_ids)
        for row in plan.rows:
            request = row.request
            request.num_in_flight -= 1
            if row.samples:
                request.num_pending -= 1
                token_id = next(tokens)
                if request.status is not Status.ENDED:
                    made.append(self._take_token(request, token_id))
            self._settle(request)
        return made

    # -- planning --------------------------------------------------------------------------------------

    def _plan_decodes(self, rows: dict[OwnerKey, Row]) -> int:
        budget = self._limits.max_step_tokens
        for request in list(self._running.values()):
            if budget == 0:
                break
            if request.num_known_tokens - request.num_computed_tokens != 1 or not request.wants_compute:
                continue
            if request.status is Status.RUNNING and self._make_room(request, rows):
                rows[request.key] = Row(
                    request, request.num_computed_tokens, 1, True, request.num_pending > 0
                )
                budget -= 1
        return self._limits.max_step_tokens - len(rows)

    def _plan_chunks(self, rows: dict[OwnerKey, Row], budget: int) -> int:
        for request in self._running.values():
            if budget == 0:
                break
            missing = request.num_known_tokens - request.num_computed_tokens
            if missing > 1 and request.wants_compute and request.status is Status.RUNNING:
                budget -= self._plan_chunk(request, rows, budget)
        return budget

    def _plan_chunk(self, request: Request, rows: dict[OwnerKey, Row], budget: int) -> int:
        missing = request.num_known_tokens - request.num_computed_tokens
        count = min(missing, budget)
        rows[request.key] = Row(request, request.num_computed_tokens, count, count == missing, False)
        return count

    def _make_room(self, request: Request, rows: dict[OwnerKey, Row]) -> bool:
        """Gives a decode row its page, retracting the youngest requests until there is one.

        False: the request sits this step out, or was itself retracted.
        """
        while not self._account.grow(request, request.num_computed_tokens + 1):
            victim = max(self._running.values(), key=lambda r: r.order)
            if victim.status is Status.RETRACTED:
                return False  # its pages come back when its step is collected
            if not self._retract(victim, rows) or victim is request:
                return False
        return True

    def _retract(self, victim: Request, rows: dict[OwnerKey, Row]) -> bool:
        """Whether the victim's pages are back already; otherwise they come with its launched step."""
        rows.pop(victim.key, None)
        victim.status = Status.RETRACTED
        self.num_retractions += 1
        self._settle(victim)
        return victim.num_in_flight == 0

    # -- admission -------------------------------------------------------------------------------------

    def _admit(self, rows: dict[OwnerKey, Row], budget: int) -> tuple[list[Request], list[Refusal]]:
        """Gives pages and a slot to waiting requests while they fit; one that doesn't may be passed."""
        reserved: list[Request] = []
        refused: list[Refusal] = []
        blocked: list[Request] = []
        for request in self._admission_order():
            if not self._free_slots or any(r.times_passed >= MAX_PASSES for r in blocked):
                break
            if request.num_in_flight or (budget == 0 and request.phase != "decode"):
                continue
            error = self._too_long(request)
            if error is not None:
                refused.append(Refusal(request, error))
            elif not self._reserve(request):
                blocked.append(request)
            else:
                budget -= self._start(request, rows, budget, reserved)
                for passed in blocked:
                    passed.times_passed += 1
        for refusal in refused:
            self.end(refusal.request)
        self.short_of_pages = bool(blocked)
        return reserved, refused

    def _admission_order(self) -> list[Request]:
        waiting = list(self._waiting)
        if self._limits.longest_prefix_first and len(waiting) <= MAX_LPM_QUEUE:
            waiting.sort(key=lambda r: -self._account.tree.num_matching_pages(r.token_ids, r.salt))
        return waiting

    def _reserve(self, request: Request) -> bool:
        """Borrows the request's prefix and allocates pages for the rest of its known tokens, if there is
        also room to generate and a page of growth for every running request."""
        known = len(request.token_ids)
        # The last token is computed here in any case, unless all KV comes from a peer.
        self._account.borrow_prefix(request, known if request.phase == "decode" else known - 1)
        room = 0 if request.phase == "prefill" else HEADROOM_TOKENS
        headroom = min(max(request.token_limit, known), known + room)
        wanted = self._account.pages_for(headroom) - len(request.page_ids) + len(self._running)
        fits = wanted <= self._account.num_available_pages or not self._running
        if not fits or not self._account.grow(request, known):
            self._account.return_prefix(request)
            return False
        return True

    def _start(
        self, request: Request, rows: dict[OwnerKey, Row], budget: int, reserved: list[Request]
    ) -> int:
        """Moves an admitted request on; returns the tokens it takes of this step."""
        self._waiting.remove(request)
        request.slot = self._free_slots.pop()
        request.num_bound_pages = -1
        request.times_passed = 0
        if request.phase == "decode":
            request.status = Status.RECEIVING
            reserved.append(request)
            return 0
        if not request.admitted_s:  # after a retraction it finds its own pages
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        request.status = Status.RUNNING
        self._running[request.key] = request
        return self._plan_chunk(request, rows, budget)

    def _too_long(self, request: Request) -> ErrorInfo | None:
        try:
            self._check_size(request)
        except PhloemError as error:
            return error.info
        return None

    def _check_size(self, request: Request) -> None:
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

    # -- results ---------------------------------------------------------------------------------------

    def _take_token(self, request: Request, token_id: int) -> Made:
        request.token_ids.append(token_id)
        reason = request.finish_reason(token_id)
        if reason is not None:
            self.end(request)
        elif request.phase == "prefill":
            self._running.pop(request.key)
            request.status = Status.SENDING
        return Made(request, token_id, reason)

    def _settle(self, request: Request) -> None:
        """Lets go of what no launched step uses any more."""
        if request.num_in_flight:
            return
        if request.status is Status.ENDED:
            self._release_slot(request)
            self._account.give_back(request)
            self._requests.pop(request.key, None)
        elif request.status is Status.SENDING:
            self._release_slot(request)
        elif request.status is Status.RETRACTED:
            self._running.pop(request.key)
            self._release_slot(request)
            self._account.give_back(request)
            request.status = Status.WAITING
            self._waiting.appendleft(request)

    def _release_slot(self, request: Request) -> None:
        if request.slot >= 0:
            self._free_slots.append(request.slot)
            request.slot = -1

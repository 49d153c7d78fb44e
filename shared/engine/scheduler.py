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

from typing import NamedTuple

from phloem.shared.engine.admission import Admission, Refusal
from phloem.shared.engine.kv_pool import OwnerKey
from phloem.shared.engine.limits import Limits
from phloem.shared.engine.page_account import PageAccount
from phloem.shared.engine.requests import Request, Status
from phloem.shared.engine.running_set import RunningSet, Slots
from phloem.shared.engine.steady_decodes import SteadyRun
from phloem.shared.engine.step_plan import Row, StepPlan, chunk_row
from phloem.shared.engine.waiting_queue import WaitingQueue
from phloem.shared.errors import PhloemError, overloaded
from phloem.shared.protocol.session import FinishReason


class Scheduled(NamedTuple):
    """`started`: requests that run from this step on. `reserved`: requests that just got pages for KV from a
    peer. `refused`: can never run here."""

    plan: StepPlan
    started: list[Request]
    reserved: list[Request]
    refused: list[Refusal]


class Made(NamedTuple):
    """What a collected step made: `token_ids[i]` is the newest token of `requests[i]`.

    finished: requests of which that is the last token, and why; they have ended. prefilled: requests of
    phase "prefill" that have their token now and wait to be handed over. same: nothing happened to any of
    `requests` but its token, and as long as that is so, each step's is the very same list.
    """

    requests: list[Request]
    token_ids: list[int]
    finished: dict[Request, FinishReason]
    prefilled: list[Request]
    same: bool = False


class Scheduler:
    """Owns the queue, the running set and the slots; asks `PageAccount` for pages."""

    def __init__(self, limits: Limits, account: PageAccount) -> None:
        self._limits = limits
        self._account = account
        self._waiting = WaitingQueue(account.tree)
        self._running = RunningSet()
        self._slots = Slots(limits.max_slots)
        self._admission = Admission(limits, account, self._waiting, self._running, self._slots)
        self._requests: dict[OwnerKey, Request] = {}  # all that are not ended, and ended ones in flight
        self._steady = SteadyRun(self._running, account)
        self._num_launched_tokens = 0  # of prompts, in steps that are not collected
        self.num_retractions = 0
        self.short_of_pages = False  # the last plan left a request waiting for pages

    # -- what there is ---------------------------------------------------------------------------------

    def get(self, key: OwnerKey) -> Request | None:
        """The live request of this key; None when it is unknown or ended."""
        self._steady.settle()
        request = self._requests.get(key)
        return None if request is None or request.status is Status.ENDED else request

    def requests(self) -> list[Request]:
        """Everything that may hold pages, ended requests of launched steps included."""
        self._steady.settle()
        return list(self._requests.values())

    def live_requests(self) -> list[Request]:
        return [request for request in self.requests() if request.status is not Status.ENDED]

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens that the device has yet to compute here, those of prompts in launched steps included."""
        return self._waiting.num_tokens + self._running.num_missing_tokens + self._num_launched_tokens

    @property
    def num_requests(self) -> int:
        """All that were accepted and have not let go of everything."""
        return len(self._requests)

    # -- what comes in ---------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queues a request. Raises `PhloemError`: a duplicate, a full queue, or one too long for the pool."""
        if request.key in self._requests:
            raise PhloemError("duplicate_request", f"request {request.request_id} is already here")
        if len(self._waiting) >= self._limits.max_queued:
            raise overloaded(
                f"{len(self._waiting)} requests wait already; try again later", code="queue_full"
            )
        self._admission.check_size(request)
        self._requests[request.key] = request
        self._waiting.append(request)

    def end(self, request: Request) -> None:
        """Ends a request in whatever state it is; its pages come back once no launched step uses them."""
        if request.status is Status.ENDED:
            return
        self._steady.settle()
        if request.status is Status.WAITING:
            self._waiting.remove(request)
        self._running.remove(request)
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
        self._running.add(request)
        self._account.share_prefix(request)

    # -- a step ----------------------------------------------------------------------------------------

    def schedule(self) -> Scheduled:
        """Plans a step and counts it as launched.

        Decode rows first (one token each), then prompt chunks of running requests, then new requests,
        until the token budget is used. Every row's pages are allocated.
        """
        steady = self._steady.next()
        plan = steady or self._plan_running()
        admitted = self._admission.admit(self._prompt_budget(plan) if len(self._waiting) else 0)
        for refusal in admitted.refused:
            self.end(refusal.request)
        self.short_of_pages = admitted.short_of_pages
        if admitted.rows:
            plan = StepPlan(plan.rows + admitted.rows)
        self._running.computing(plan.num_tokens)
        self._num_launched_tokens += sum(row.num_tokens for row in plan.chunks)
        if plan is steady:
            self._steady.launched()
        else:
            plan.count()
            self._steady.begin(plan)
        started = [row.request for row in admitted.rows]
        return Scheduled(plan, started, admitted.reserved, admitted.refused)

    def launched(self, plan: StepPlan) -> None:
        """The device was given the step: later steps may read the KV of its prompt chunks."""
        for row in plan.chunks:
            self._account.share_prefix(row.request)

    def collect(self, plan: StepPlan, token_ids: list[int]) -> Made:
        """Takes a finished step's tokens, one for each row that samples, in order of the rows."""
        if self._steady.collected(plan, token_ids):
            self._running.made(len(token_ids))
            return Made(plan.sampled, token_ids, {}, [], same=True)
        self._steady.settle()
        if plan.decode is None:
            for row in plan.rows:
                if not row.samples:
                    row.request.num_in_flight -= 1
                    self._settle(row.request)
        self._num_launched_tokens -= sum(row.num_tokens for row in plan.chunks)
        made = Made([], [], {}, [])
        running, ended = Status.RUNNING, Status.ENDED
        for request, token_id in zip(plan.sampled, token_ids, strict=True):
            request.num_in_flight -= 1
            request.num_pending -= 1
            if request.status is not ended:
                known = request.token_ids
                known.append(token_id)
                made.requests.append(request)
                made.token_ids.append(token_id)
                if token_id in request.stop_token_ids or len(known) >= request.token_limit:
                    made.finished[request] = "stop" if token_id in request.stop_token_ids else "length"
                    self.end(request)
                elif request.phase == "prefill":
                    made.prefilled.append(request)
                    self._running.remove(request)
                    request.status = Status.SENDING
            if request.status is not running:
                self._settle(request)
        self._running.made(len(made.requests))
        return made

    # -- planning --------------------------------------------------------------------------------------

    def _plan_running(self) -> StepPlan:
        rows: dict[Request, Row] = {}
        self._steady.drop()
        requests = self._running.requests()
        self._plan_decodes(requests, rows)
        budget = self._chunk_budget(len(rows))
        for request in requests:
            if budget == 0:
                break
            missing = request.num_known_tokens - request.num_computed_tokens
            if missing > 1 and request.wants_compute and request.status is Status.RUNNING:
                rows[request] = chunk_row(request, budget)
                budget -= rows[request].num_tokens
        return StepPlan(list(rows.values()))

    def _plan_decodes(self, requests: list[Request], rows: dict[Request, Row]) -> None:
        budget = self._limits.max_step_tokens
        for request in requests:
            if budget == 0:
                break
            if request.num_known_tokens - request.num_computed_tokens != 1 or not request.wants_compute:
                continue
            if request.status is Status.RUNNING and self._make_room(request, rows):
                start = request.num_computed_tokens
                rows[request] = Row(request, start, 1, True, request.num_pending > 0)
                budget -= 1

    def _chunk_budget(self, num_decodes: int) -> int:
        """Prompt tokens beside so many decode rows."""
        budget = self._limits.max_step_tokens - num_decodes
        if num_decodes and self._limits.max_mixed_tokens:
            return min(budget, self._limits.max_mixed_tokens)
        return budget

    def _prompt_budget(self, plan: StepPlan) -> int:
        """Prompt tokens that may join the plan."""
        if plan.decode is not None:
            return self._chunk_budget(plan.num_rows)
        chunk_tokens = sum(row.num_tokens for row in plan.chunks)
        return self._chunk_budget(plan.num_tokens - chunk_tokens) - chunk_tokens

    def _make_room(self, request: Request, rows: dict[Request, Row]) -> bool:
        """Gives a decode row its page, retracting the youngest requests until there is one.

        False: the request sits this step out, or was itself retracted.
        """
        while not self._account.grow(request, request.num_computed_tokens + 1):
            victim = self._running.youngest()
            if victim.status is Status.RETRACTED:
                return False  # its pages come back when its step is collected
            if not self._retract(victim, rows) or victim is request:
                return False
        return True

    def _retract(self, victim: Request, rows: dict[Request, Row]) -> bool:
        """Whether the victim's pages are back already; otherwise they come with its launched step."""
        rows.pop(victim, None)
        victim.status = Status.RETRACTED
        self.num_retractions += 1
        self._settle(victim)
        return victim.num_in_flight == 0

    # -- results ---------------------------------------------------------------------------------------

    def _settle(self, request: Request) -> None:
        """Lets go of what no launched step uses any more."""
        if request.num_in_flight:
            return
        if request.status is Status.ENDED:
            self._slots.release(request)
            self._account.give_back(request)
            self._requests.pop(request.key, None)
        elif request.status is Status.SENDING:
            self._slots.release(request)
        elif request.status is Status.RETRACTED:
            self._running.remove(request)
            self._slots.release(request)
            self._account.give_back(request)
            request.status = Status.WAITING
            self._waiting.put_first(request)

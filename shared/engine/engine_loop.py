"""The engine: one thread that takes messages, plans steps, launches them and reports what they made.

    turn:  take the inbox -> collect a finished step -> report -> send computed KV, admit arrived KV
           -> plan and launch a step

With a device that runs ahead (CUDA), a turn launches step N + 1 while step N runs, and collects N after,
unless a message comes first: then the next turn sees to that and goes on waiting. With a synchronous one
(CPU) a launched step is ready at once and is collected by the next turn before it plans. Only this thread
touches requests, pages and the radix tree.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

from phloem.shared.engine.engine_socket import FrontGone
from phloem.shared.engine.engine_status import EngineStatus
from phloem.shared.engine.grammar.desk import GrammarReady
from phloem.shared.engine.grammar.grammars import Grammars
from phloem.shared.engine.grammar.parts import GrammarParts
from phloem.shared.engine.handover import Channels, PageStore
from phloem.shared.engine.handover_receive import HandoverReceiver
from phloem.shared.engine.handover_send import HandoverSender
from phloem.shared.engine.intake import Intake
from phloem.shared.engine.limits import Limits
from phloem.shared.engine.outbox import Outbox
from phloem.shared.engine.page_account import PageAccount
from phloem.shared.engine.rates import Rates
from phloem.shared.engine.request_ends import RequestEnds
from phloem.shared.engine.scheduler import Scheduler
from phloem.shared.engine.step_plan import StepPlan
from phloem.shared.engine.step_runner import LaunchedStep, LayerWatch, StepRunner
from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.engine import (
    AbortGateway,
    AuditRequest,
    DumpTree,
    EngineAbort,
    EngineMessage,
    EngineSubmit,
    EngineUp,
    FlushCache,
    PeerDown,
    PeerUp,
    Reply,
    Stop,
    TreeDump,
)
from phloem.shared.protocol.session import PeerRef
from phloem.shared.transfer.events import (
    AdmittedReceived,
    CancelReceived,
    ChannelLost,
    ChannelOpened,
    LastReceived,
    PieceReceived,
    ReadyReceived,
    SlotAvailable,
    TransferEvent,
)
from phloem.shared.transfer.pending import Pending

log = logging.getLogger(__name__)

InboxItem: TypeAlias = EngineMessage | TransferEvent | GrammarReady | FrontGone

_TICK_S = 0.25  # how often deadlines are looked at while nothing else happens
_POLL_S = 0.000_05  # how often the device is looked at while no message comes
_MAX_IN_FLIGHT = 2  # steps launched and not collected: one runs, the next waits behind it on the device


class Peers(Channels, Protocol):
    """What the loop needs of `TransferEndpoint` beyond hand-overs."""

    def peer_up(self, peer: PeerRef, address: str) -> None: ...
    def peer_down(self, peer: PeerRef) -> None: ...


class EngineParts(NamedTuple):
    """What an engine is made of; the tests exchange the runner and the channels."""

    limits: Limits
    account: PageAccount
    runner: StepRunner
    channels: Peers
    store: PageStore
    send: Callable[[EngineUp], None]
    dials_peers: bool  # prefill and unified workers
    eos_token_ids: tuple[int, ...]
    context_length: int
    handover_timeout_s: float
    overlap: bool = True
    grammars: GrammarParts | None = None  # none: requests with a grammar are refused
    transfer_bytes_per_s: Callable[[], float] = lambda: 0.0  # measured; zero: not yet
    clock: Callable[[], float] = time.monotonic


class _InFlight(NamedTuple):
    plan: StepPlan
    step: LaunchedStep
    launched_at_s: float


class Engine:
    """Runs until `Stop`, or until its front is gone."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._clock = parts.clock
        self._account = parts.account
        self._scheduler = Scheduler(parts.limits, parts.account)
        self._outbox = Outbox(parts.send)
        self._rates = Rates()
        self._inbox: queue.SimpleQueue[InboxItem] = queue.SimpleQueue()
        self._deferred: deque[InboxItem] = deque()  # taken from the inbox in the course of a launch
        self._in_flight: deque[_InFlight] = deque()
        self._sender = HandoverSender(
            parts.channels,
            parts.store,
            parts.account.tree.page_size,
            timeout_s=parts.handover_timeout_s,
            clock=parts.clock,
        )
        self._receiver = HandoverReceiver(
            parts.channels, parts.store, timeout_s=parts.handover_timeout_s, clock=parts.clock
        )
        self._ends = RequestEnds(self._scheduler, self._sender, self._receiver, self._outbox)
        self._grammars = Grammars(
            parts.grammars, lambda request, error: self._ends.drop(request, "failed", error)
        )
        self._intake = Intake(
            self._scheduler,
            self._sender,
            self._outbox,
            self._grammars,
            eos_token_ids=parts.eos_token_ids,
            context_length=parts.context_length,
            clock=parts.clock,
        )
        self._status = EngineStatus(self._scheduler, parts.account, self._rates, self._sender, self._receiver)
        self._next_tick_s = 0.0
        self._collected_at_s = 0.0  # of the step before: a device that runs ahead begins the next one then
        self._stopped = False

    def deliver(self, item: InboxItem) -> None:
        """Hands the loop a message; the one method that other threads may call."""
        self._inbox.put(item)

    def run(self) -> None:
        """Turns until stopped. Raises what the device or the front's socket raises."""
        busy = False
        while not self._stopped:
            busy = self.turn(wait=not busy)

    def close(self) -> None:
        """Ends the grammar compiler, if one was started; for who drives an engine without `run`."""
        self._grammars.close()

    def turn(self, *, wait: bool = False) -> bool:
        """One turn; with `wait` it first sleeps until there is a message or a deadline may be due.

        Returns whether there is something to do even if no message comes.
        """
        self._take_inbox(wait=wait)
        if self._stopped:
            return False
        moved = self._step()
        return moved or bool(self._in_flight) or self._outbox.has_outputs

    # -- one turn --------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Everything of a turn but the inbox; whether a step was launched, or one collected after planning:
        its pages may be what a waiting request needs."""
        self._status.num_turns += 1
        if self._in_flight and (not self._parts.overlap or self._in_flight[0].step.ready()):
            self._collect()
        self._tick()
        self._flush()
        self._ends.handovers(self._sender.pump())
        self._take_arrived()
        launched = len(self._in_flight) < _MAX_IN_FLIGHT and self._launch()
        overdue = len(self._in_flight) > (1 if launched else 0)
        if overdue and self._await_device(self._in_flight[0].step):
            self._collect()
        return launched or overdue

    def _await_device(self, step: LaunchedStep) -> bool:
        """Whether the step is ready now. A message that comes before it is handled and ends the wait, and so
        do KV that was computed or has arrived: a request to launch behind the running step, or pages to send,
        must not wait for a whole step."""
        while not step.ready():
            if self._deferred or self._sender.has_news or self._receiver.has_news:
                return False
            try:
                self._handle(self._inbox.get(timeout=_POLL_S))
            except queue.Empty:
                continue
            return False
        return True

    def _take_arrived(self) -> None:
        """Requests whose KV has come join the running batch."""
        arrived, failed = self._receiver.poll()
        self._ends.handovers(failed)
        for request, token_ids in arrived:
            self._scheduler.received(request, token_ids)

    def _watch(self, plan: StepPlan) -> LayerWatch | None:
        """For a step that computes KV to be sent."""
        if not self._sender.active:
            return None
        self._parts.store.fence()  # it may write to pages of a retracted request that are still being read
        watch = self._sender.watch(
            plan.rows,
            tokens_per_s=self._rates.prefill_tokens_per_s,
            bytes_per_s=self._status.transfer_bytes_per_s,
        )
        return None if watch is None else watch._replace(reached=partial(self._reached, watch.reached))

    def _reached(self, tell: Callable[[int, Pending], None], layer_end: int, mark: Pending) -> None:
        """In the course of a launch, which takes as long as the step where launches are synchronous: KV must
        not wait for its end because decode's go-ahead, or a staging slot, came after its beginning."""
        while not self._deferred and not self._inbox.empty():
            item = self._inbox.get_nowait()
            if isinstance(item, ReadyReceived | SlotAvailable):
                self._handle(item)
            else:
                self._deferred.append(item)  # as is all that comes after it, in its order
        tell(layer_end, mark)

    def _launch(self) -> bool:
        scheduled = self._scheduler.schedule()
        now_s = self._clock()
        for refusal in scheduled.refused:
            self._ends.drop(refusal.request, "failed", refusal.error)
        for request in scheduled.reserved:
            request.admitted_s = now_s
            self._ends.handovers([self._receiver.reserved(request)])
        for request in scheduled.started:
            request.admitted_s = request.admitted_s or now_s
        plan = scheduled.plan
        if not plan.num_rows:
            return False
        step = self._parts.runner.launch(plan, self._watch(plan))
        self._in_flight.append(_InFlight(plan, step, now_s))
        self._status.num_steps += 1
        self._scheduler.launched(plan)
        if len(self._in_flight) == 1:
            self._sample_oldest()
        return True

    def _sample_oldest(self) -> None:
        """The second phase of a step with grammars: all tokens before it are known now. The device is in the
        middle of its first phase, if the loop is in time."""
        plan, step, _ = self._in_flight[0]
        if plan.constrained:
            step.sample(self._grammars.masks(plan))

    def _collect(self) -> None:
        """Takes the oldest step's tokens; waits for the device if it must."""
        plan, step, launched_at_s = self._in_flight.popleft()
        token_ids = step.token_ids()
        now_s = self._clock()
        self._rates.observe(plan, now_s - max(launched_at_s, self._collected_at_s))
        self._collected_at_s = now_s
        made = self._scheduler.collect(plan, token_ids)
        self._outbox.tokens(made, now_s)
        for request in made.finished:
            self._ends.drop(request, "finished")
        for request in made.prefilled:
            self._sender.tokens_made(request, request.token_ids[-1:])
        if self._in_flight:
            self._sample_oldest()

    def _flush(self) -> None:
        self._outbox.flush(self._status.num_turns, self._account.tree.take_events(), self._status.load())

    def _tick(self) -> None:
        """Deadlines, a few times a second."""
        now_s = self._clock()
        if now_s < self._next_tick_s:
            return
        self._next_tick_s = now_s + _TICK_S
        self._status.transfer_bytes_per_s = self._parts.transfer_bytes_per_s()
        self._ends.handovers(self._receiver.expired())
        in_the_way = self._sender.in_the_way() if self._scheduler.short_of_pages else None
        if in_the_way is not None:
            error = ErrorInfo("handover_no_room", "the decode worker has no room for it yet", True, 503)
            self._ends.drop(in_the_way, "failed", error)
        self._ends.fail_overdue(now_s)

    # -- inbox -----------------------------------------------------------------------------------------

    def _take_inbox(self, *, wait: bool) -> None:
        """Handles all that is there; with `wait`, sleeps until something is or a deadline may be due."""
        while self._deferred and not self._stopped:
            wait = False
            self._handle(self._deferred.popleft())
        try:
            until_s = _POLL_S if self._receiver.is_moving else _TICK_S
            item = self._inbox.get(timeout=until_s) if wait else self._inbox.get_nowait()
            self._handle(item)
            while not self._stopped:
                self._handle(self._inbox.get_nowait())
        except queue.Empty:
            return

    def _handle(self, item: InboxItem) -> None:
        match item:
            case EngineSubmit():
                self._intake.submit(item)
            case EngineAbort(request_id, attempt):
                self._ends.abort(self._scheduler.get((request_id, attempt)))
            case AbortGateway(gateway):
                self._ends.abort_gateway(gateway)
            case PeerUp(peer, address):
                if self._parts.dials_peers:
                    self._parts.channels.peer_up(peer, address)
            case PeerDown(peer):
                self._parts.channels.peer_down(peer)
                self._ends.fail_peers_requests(peer, ErrorInfo("peer_gone", "the worker is gone", True, 503))
            case FlushCache(tag):
                self._account.flush()
                self._parts.send(Reply(tag))
            case AuditRequest(tag):
                self._parts.send(self._status.audit(tag))
            case DumpTree(tag):
                self._flush()
                self._parts.send(TreeDump(tag, self._account.tree.block_hashes()))
            case Stop():
                self._stop()
            case GrammarReady():
                self._grammars.done(item)
            case FrontGone(message):
                log.warning("the front is gone, ending: %s", message)
                self._stopped = True
            case _:
                self._handle_transfer(item)

    def _handle_transfer(self, event: TransferEvent) -> None:
        match event:
            case ChannelOpened(peer, side):
                if side == "decode":
                    self._receiver.on_opened(peer)
            case ChannelLost(peer, side, error):
                self._channel_lost(peer, side, error)
            case ReadyReceived(peer, message):
                self._sender.on_ready(peer, message)
            case SlotAvailable():
                pass  # the turn that follows pumps
            case PieceReceived():
                self._ends.handovers([self._receiver.on_piece(event)])
            case LastReceived(peer, last):
                self._ends.handovers([self._receiver.on_last(peer, last)])
            case AdmittedReceived(_, admitted, at_s):
                self._sender.on_admitted((admitted.request_id, admitted.attempt), at_s)
            case CancelReceived(peer, side, cancel):
                if side == "decode":
                    self._ends.handovers([self._receiver.on_cancel(peer, cancel)])
                else:
                    ended = self._sender.on_cancel(peer, (cancel.request_id, cancel.attempt))
                    self._ends.handovers([ended])

    def _channel_lost(self, peer: PeerRef, side: str, error: ErrorInfo) -> None:
        log.warning("KV channel with %s (as %s) is lost: %s", peer.worker_id, side, error.message)
        end = self._receiver if side == "decode" else self._sender
        self._ends.handovers(end.on_lost(peer, error))

    def _stop(self) -> None:
        self._ends.abort_all()
        while self._in_flight:
            self._collect()
        self._flush()
        self._stopped = True

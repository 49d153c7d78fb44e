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
from collections.abc import Callable
from functools import partial

from phloem.shared.engine.engine_parts import EngineParts
from phloem.shared.engine.engine_socket import FrontGone
from phloem.shared.engine.engine_status import EngineStatus
from phloem.shared.engine.grammar.desk import GrammarReady
from phloem.shared.engine.grammar.grammars import Grammars
from phloem.shared.engine.handover_receive import HandoverReceiver
from phloem.shared.engine.handover_send import HandoverSender
from phloem.shared.engine.inbox import Inbox, InboxItem
from phloem.shared.engine.intake import Intake
from phloem.shared.engine.outbox import Outbox
from phloem.shared.engine.rates import Rates
from phloem.shared.engine.request_ends import RequestEnds
from phloem.shared.engine.scheduler import Scheduler
from phloem.shared.engine.step_plan import StepPlan
from phloem.shared.engine.step_runner import LayerWatch
from phloem.shared.engine.steps_in_flight import StepsInFlight
from phloem.shared.engine.transfer_intake import TransferIntake
from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.engine import (
    AbortGateway,
    AuditRequest,
    DumpTree,
    EngineAbort,
    EngineSubmit,
    FlushCache,
    PeerDown,
    PeerUp,
    Reply,
    Stop,
    TreeDump,
)
from phloem.shared.transfer.events import ReadyReceived, SlotAvailable
from phloem.shared.transfer.pending import Pending

log = logging.getLogger(__name__)

_TICK_S = 0.25  # how often deadlines are looked at while nothing else happens
_POLL_S = 0.000_05  # how often the device is looked at while no message comes


class Engine:
    """Runs until `Stop`, or until its front is gone."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._clock = parts.clock
        self._account = parts.account
        self._scheduler = Scheduler(parts.limits, parts.account)
        self._outbox = Outbox(parts.send)
        self._rates = Rates()
        self._inbox = Inbox()
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
        self._transfers = TransferIntake(self._sender, self._receiver, self._ends)
        self._steps = StepsInFlight(
            parts.runner,
            self._grammars,
            self._rates,
            parts.clock,
            overlap=parts.overlap,
            hang_timeout_s=parts.hang_timeout_s,
        )
        self._status = EngineStatus(self._scheduler, parts.account, self._rates, self._sender, self._receiver)
        self._next_tick_s = 0.0
        self._stopped = False

    def deliver(self, item: InboxItem) -> None:
        """Hands the loop a message; the one method that other threads may call."""
        self._inbox.deliver(item)

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
        return moved or len(self._steps) > 0 or self._outbox.has_outputs

    # -- one turn --------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Everything of a turn but the inbox; whether a step was launched, or one collected after planning:
        its pages may be what a waiting request needs."""
        self._status.num_turns += 1
        if self._steps.oldest_is_ready():
            self._steps.collect(self._take_tokens)
        self._tick()
        self._flush()
        self._ends.handovers(self._sender.pump())
        self._take_arrived()
        launched = self._steps.has_room and self._launch()
        overdue = len(self._steps) > (1 if launched else 0)
        if overdue and self._await_device():
            self._steps.collect(self._take_tokens)
        return launched or overdue

    def _await_device(self) -> bool:
        """Whether the oldest step is ready now. A message that comes before it is handled and ends the wait,
        and so do KV that was computed or has arrived: a request to launch behind the running step, or pages
        to send, must not wait for a whole step. Nor must deadlines, on a device that is slow or hangs."""
        while not self._steps.oldest_is_ready():
            if self._inbox.has_passed_over or self._sender.has_news or self._receiver.has_news:
                return False
            if self._clock() >= self._next_tick_s:
                return False
            item = self._inbox.next(_POLL_S)
            if item is not None:
                self._handle(item)
                return False
        return True

    def _take_arrived(self) -> None:
        """Requests whose KV has come join the running batch."""
        arrived, failed = self._receiver.poll()
        self._ends.handovers(failed)
        for request, token_ids in arrived:
            self._scheduler.received(request, token_ids)
        self._receiver.tell_admitted()

    def _watch(self, plan: StepPlan) -> LayerWatch | None:
        """For a step that computes KV to be sent."""
        if not self._sender.active:
            return None
        self._parts.store.fence()  # it may write to pages of a retracted request that are still being read
        watch = self._sender.watch(
            plan.rows,
            tokens_per_s=self._rates.prefill_tokens_per_s,
            rates=self._status.send_rates,
        )
        return None if watch is None else watch._replace(reached=partial(self._reached, watch.reached))

    def _reached(self, tell: Callable[[int, Pending], None], layer_end: int, mark: Pending) -> None:
        """In the course of a launch, which takes as long as the step where launches are synchronous: KV must
        not wait for its end because decode's go-ahead, or a staging slot, came after its beginning."""
        for item in self._inbox.urgent((ReadyReceived, SlotAvailable)):
            self._handle(item)
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
        self._steps.launch(plan, self._watch(plan))
        self._status.num_steps += 1
        self._scheduler.launched(plan)
        return True

    def _take_tokens(self, plan: StepPlan, token_ids: list[int], now_s: float) -> None:
        """Of a collected step."""
        made = self._scheduler.collect(plan, token_ids)
        self._outbox.tokens(made, now_s)
        for request in made.finished:
            self._ends.drop(request, "finished")
        for request in made.prefilled:
            self._sender.tokens_made(request, request.token_ids[-1:])

    def _flush(self) -> None:
        events, load = self._account.tree.take_events(), self._status.load()
        busy = self._scheduler.num_requests > 0
        self._outbox.flush(self._status.num_turns, events, load, self._clock(), busy=busy)

    def _tick(self) -> None:
        """Deadlines, a few times a second."""
        now_s = self._clock()
        if now_s < self._next_tick_s:
            return
        self._next_tick_s = now_s + _TICK_S
        self._steps.check_hang(now_s)
        self._status.send_rates = self._parts.send_rates()
        self._status.transfer = self._parts.transfer_status()
        self._ends.fail_cut_off(self._status.transfer.cut_off)
        self._ends.handovers(self._receiver.expired())
        in_the_way = self._sender.in_the_way() if self._scheduler.short_of_pages else None
        if in_the_way is not None:
            error = ErrorInfo("handover_no_room", "the decode worker has no room for it yet", True, 503)
            self._ends.drop(in_the_way, "failed", error)
        self._ends.fail_overdue(now_s)

    # -- inbox -----------------------------------------------------------------------------------------

    def _take_inbox(self, *, wait: bool) -> None:
        """Handles all that is there; with `wait`, sleeps until something is, or until a step is due."""
        item = self._await_item() if wait else self._inbox.next()
        while item is not None:
            self._handle(item)
            item = None if self._stopped else self._inbox.next()

    def _await_item(self) -> InboxItem | None:
        """The next one; None when there is something to do without."""
        while not (self._receiver.has_news or self._sender.has_news):
            item = self._inbox.next(self._next_look_s)
            if item is not None or self._clock() >= self._next_tick_s:
                return item
        return self._inbox.next()

    @property
    def _next_look_s(self) -> float:
        """How long to sleep while no message comes."""
        if self._receiver.is_moving:
            return self._receiver.next_look_s
        return _POLL_S if self._sender.expects_ready else _TICK_S

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
                self._transfers.take(item)

    def _stop(self) -> None:
        self._ends.abort_all()
        while len(self._steps):
            self._steps.collect(self._take_tokens)
        self._flush()
        self._stopped = True

"""A worker: the engine's own scheduler, pages and tree, on a modelled device.

The loop is the engine's: with one step on the device the next is planned and launched behind it; with two it
waits for the older one, and what arrives meanwhile is seen after.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from phloem.shared.block_hash import BlockHasher
from phloem.shared.engine.kv_pool import KVPool, OwnerKey
from phloem.shared.engine.limits import Limits
from phloem.shared.engine.page_account import PageAccount
from phloem.shared.engine.radix_tree import RadixTree
from phloem.shared.engine.rates import Rates
from phloem.shared.engine.requests import Request, Status
from phloem.shared.engine.scheduler import Scheduler
from phloem.shared.engine.step_plan import StepPlan
from phloem.shared.protocol.cluster import Role, WorkerLoad, WorkerRecord
from phloem.shared.protocol.session import PeerRef, Submit
from phloem.simulate.events import EventQueue
from phloem.simulate.options import SimulationOptions
from phloem.simulate.step_time import StepTime, step_time

CONTEXT_UNITS = 1 << 24
_MAX_QUEUED = 1 << 20  # nobody is refused: a simulation loses no request
_ANSWER_UNIT = 1 << 31  # beyond any prompt's; an answer's first unit is its request's own


class Computed(NamedTuple):
    """A request's known units were computed up to `num_units`; `samples` when that made a unit."""

    request: Request
    num_units: int


class StepDone(NamedTuple):
    """What a collected step did: `made` are requests that have one unit more now. `prompt_done_s` is when
    those of prompt chunks were there."""

    computed: list[Computed]
    made: list[Request]
    prompt_done_s: float


class _InFlight(NamedTuple):
    plan: StepPlan
    time: StepTime
    launched_s: float
    started_s: float
    done_s: float


def _record(ref: PeerRef, role: Role, options: SimulationOptions) -> WorkerRecord:
    return WorkerRecord(
        worker_id=ref.worker_id,
        epoch=ref.epoch,
        role=role,
        rpc_address="",
        model_id="simulated",
        page_size=options.shape.page_tokens,
        context_length=CONTEXT_UNITS,
        kv_layout="simulated",
        kv_bytes_per_token=options.steps.kv_bytes_per_token,
        transfer_address="" if role == "prefill" else "simulated",
        device="cuda",
        max_running_requests=options.shape.max_running,
    )


class SimWorker:
    """One engine. Within a turn it calls `on_step` with each collected step, `on_reserved` with requests that
    got pages for a peer's KV, `on_short` when one waits for pages, `on_tree` with what the tree stored and
    removed; `on_load` whenever its load is another."""

    def __init__(
        self,
        slot: int,
        role: Role,
        options: SimulationOptions,
        events: EventQueue,
        hasher: BlockHasher,
        *,
        on_step: Callable[[SimWorker, StepDone], None],
        on_reserved: Callable[[SimWorker, list[Request]], None],
        on_short: Callable[[SimWorker], None],
        on_load: Callable[[SimWorker], None],
        on_tree: Callable[[int, Sequence[bytes], Sequence[bytes]], None],
    ) -> None:
        shape = options.shape
        self.slot = slot
        self.worker_id = f"{role}-{slot:03}"
        self.ref = PeerRef(self.worker_id, 1)
        self.role = role
        self.busy_s = 0.0
        self.num_steps = 0
        self._events = events
        self._steps = options.steps
        self._grain = shape.grain
        self._on_step = on_step
        self._on_reserved = on_reserved
        self._on_short = on_short
        self._on_load = on_load
        self._on_tree = on_tree
        self.account = PageAccount(KVPool(shape.num_pages), RadixTree(shape.page_units), hasher)
        self.scheduler = Scheduler(
            Limits(shape.chunk_tokens // shape.grain, shape.max_running, _MAX_QUEUED), self.account
        )
        self._rates = Rates()
        self._transfer_bytes_per_s = options.delays.transfer_bytes_per_s
        self._in_flight: deque[_InFlight] = deque()
        self._free_at_s = 0.0
        self._collected_at_s = 0.0
        self._order = 0
        self._turning = False
        self._noted_load = (0, 0)
        self._record = _record(self.ref, role, options)

    # -- what comes in ---------------------------------------------------------------------------------

    def submit(self, submit: Submit) -> Request:
        """Queues a request, as an engine's intake does."""
        self._order += 1
        request = Request(
            submit,
            gateway=0,
            order=self._order,
            eos_token_ids=(),
            context_length=CONTEXT_UNITS,
            now_s=self._events.now_s,
        )
        self.scheduler.submit(request)
        self._note_load()
        self.wake()
        return request

    def end(self, key: OwnerKey) -> None:
        """Handed over, or given up by its gateway; nothing happens when it has ended."""
        request = self.scheduler.get(key)
        if request is not None:
            self.scheduler.end(request)
            self.wake()

    def received(self, key: OwnerKey, token_ids: list[int]) -> None:
        """The KV of a request is here, whole, with the units made elsewhere."""
        request = self.scheduler.get(key)
        if request is not None:
            self.scheduler.received(request, token_ids)
            self.wake()

    def wake(self) -> None:
        """Something changed: a turn, unless the loop waits for the device."""
        if not self._turning and len(self._in_flight) < 2:
            self._turn()

    # -- what others are told --------------------------------------------------------------------------

    def record(self) -> WorkerRecord:
        """What a heartbeat would carry now, in tokens."""
        return msgspec.structs.replace(self._record, load=self._load())

    def _load(self) -> WorkerLoad:
        grain = self._grain
        scheduler = self.scheduler
        return WorkerLoad(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_handing_over=self._num_others(),
            queued_tokens=scheduler.num_queued_tokens * grain,
            free_pages=self.account.num_available_pages,
            total_pages=self.account.pool.num_pages,
            tree_pages=self.account.tree.num_pages,
            prefill_tokens_per_s=self._rates.prefill_tokens_per_s * grain,
            decode_step_s=self._rates.decode_step_s / grain,
            transfer_bytes_per_s=self._transfer_bytes_per_s,
        )

    def _num_others(self) -> int:
        return self.scheduler.num_requests - self.scheduler.num_running - self.scheduler.num_waiting

    def problems(self) -> list[str]:
        """What is wrong once all requests have ended; empty when nothing is."""
        left = [f"request {request.request_id} was left behind" for request in self.scheduler.requests()]
        found = left + self.account.audit(self.scheduler.requests())
        return [f"{self.worker_id}: {problem}" for problem in found]

    # -- the loop --------------------------------------------------------------------------------------

    def _note_load(self) -> None:
        """Requests and queued tokens are what routing goes by; free pages change with every step."""
        noted = (self.scheduler.num_requests, self.scheduler.num_queued_tokens)
        if noted != self._noted_load:
            self._noted_load = noted
            self._on_load(self)

    def _turn(self) -> None:
        self._turning = True
        while len(self._in_flight) < 2 and self._launch():
            pass
        stored, removed = self.account.tree.take_events()
        self._on_tree(self.slot, stored, removed)
        if self.scheduler.short_of_pages:
            self._on_short(self)
        self._turning = False

    def _launch(self) -> bool:
        scheduled = self.scheduler.schedule()
        assert not scheduled.refused, f"{self.worker_id}: a prompt is larger than --kv-tokens"
        if scheduled.reserved:
            self._on_reserved(self, scheduled.reserved)
        plan = scheduled.plan
        if not plan.rows:
            return False
        now_s = self._events.now_s
        time = step_time(self._steps, plan, self._grain)
        started_s = max(now_s, self._free_at_s)
        self._free_at_s = started_s + time.total_s
        self.busy_s += time.total_s
        self.num_steps += 1
        self._in_flight.append(_InFlight(plan, time, now_s, started_s, self._free_at_s))
        self.scheduler.launched(plan)
        self._events.at(self._free_at_s, self._collect)
        return True

    def _collect(self) -> None:
        step = self._in_flight.popleft()
        self._rates.observe(step.plan, step.done_s - max(step.launched_s, self._collected_at_s))
        self._collected_at_s = step.done_s
        computed = [Computed(row.request, row.start + row.num_tokens) for row in step.plan.rows]
        sampled = [row.request for row in step.plan.rows if row.samples]
        made = [request for request in sampled if request.status is not Status.ENDED]
        self.scheduler.collect(step.plan, [_answer_unit(request) for request in sampled])
        self._turning = True  # what the listeners end or submit here is seen by the turn below
        self._note_load()
        self._on_step(self, StepDone(computed, made, step.started_s + step.time.prompt_s))
        self._turn()


def _answer_unit(request: Request) -> int:
    """A unit that no other request has."""
    return _ANSWER_UNIT + int(request.request_id)

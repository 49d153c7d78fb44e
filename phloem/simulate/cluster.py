"""A simulated cluster: wires gateways, workers, index and KV links together and runs a workload through."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import get_args

import msgspec

from phloem.services.gateway.cluster.routing import RoutingPolicy
from phloem.shared.block_hash import BLOCK_TOKENS, BlockHasher
from phloem.shared.engine.kv_pool import OwnerKey
from phloem.shared.engine.requests import Request, Status
from phloem.shared.errors import ConfigError
from phloem.shared.protocol.cluster import Role
from phloem.shared.protocol.session import Phase, SamplingParams, Submit
from phloem.simulate.events import EventQueue
from phloem.simulate.gateway import Placement, SimGateway
from phloem.simulate.index import SimIndex
from phloem.simulate.kv_sender import KvSender
from phloem.simulate.load_news import LoadNews
from phloem.simulate.options import SimulationOptions
from phloem.simulate.outcome import Outcome
from phloem.simulate.worker import SimWorker, StepDone
from phloem.simulate.workload import SimRequest

_TICK_S = 0.25  # how often a prefill worker short of pages looks for a request that is in the way


class _Live:
    """A request between its arrival and its end."""

    def __init__(self, request: SimRequest, gateway: SimGateway, outcome: Outcome) -> None:
        self.request = request
        self.gateway = gateway
        self.outcome = outcome
        self.attempt = 0
        self.units: list[int] = []
        self.block_hashes: list[bytes] = []
        self.emitted: list[int] = []
        self.placement: Placement | None = None


class SimulatedCluster:
    """Runs once. Deterministic: equal workload and options give equal outcomes."""

    def __init__(self, requests: Sequence[SimRequest], options: SimulationOptions) -> None:
        options.check()
        options.shape.check_fits(requests)
        self.options = options
        self.events = EventQueue()
        self._requests = requests
        self._hasher = BlockHasher(b"phloem simulate")
        self._rng = random.Random(f"simulate/{options.seed}")
        shape, delays = options.shape, options.delays
        self.index = SimIndex(self.events, shape.num_workers, delays.publish_s, delays.announce_ttl_s)
        roles: list[Role] = ["prefill"] * shape.num_prefill
        roles += ["decode"] * shape.num_decode
        roles += ["unified"] * shape.num_unified
        self.workers = [self._worker(slot, role) for slot, role in enumerate(roles)]
        self._senders = {
            worker.slot: KvSender(
                self.events,
                shape.grain * options.steps.kv_bytes_per_token,
                delays.transfer_bytes_per_s,
                delays.transfer_latency_s,
                partial(self._handed_over, worker),
            )
            for worker in self.workers
            if worker.role != "decode"
        }
        self._ticking: set[int] = set()
        refs = [worker.ref for worker in self.workers]
        self.gateways = [
            SimGateway(
                _policy(options.policy),
                self.events,
                self.index,
                refs,
                [worker.record() for worker in self.workers],
                BLOCK_TOKENS * shape.grain,
            )
            for _ in range(shape.num_gateways)
        ]
        self._news = LoadNews(self.events, delays, self.workers, self.gateways)
        self._live: dict[str, _Live] = {}
        self.outcomes: list[Outcome] = []
        self._num_left = len(requests)

    def run(self) -> list[Outcome]:
        """All requests, from the first arrival to the last end; in order of the workload."""
        self._news.start(self._rng)
        self._arrive_later(0)
        self.events.run(lambda: self._num_left == 0 and not self._is_busy)
        return self.outcomes

    def problems(self) -> list[str]:
        """What is wrong after `run`: lost or doubled requests, pages without owner, links that still wait."""
        found = [
            f"request {outcome.index} ended {outcome.num_ends} times"
            for outcome in self.outcomes
            if outcome.num_ends != 1 or outcome.first_token_s < 0
        ]
        if len(self.outcomes) != len(self._requests):
            found.append(f"{len(self._requests)} requests were given and {len(self.outcomes)} have ended")
        for worker in self.workers:
            found += worker.problems()
        found += [
            f"sender of worker {slot} still waits" for slot, s in self._senders.items() if not s.is_empty
        ]
        found += [f"gateway {n} still counts requests" for n, g in enumerate(self.gateways) if not g.is_idle]
        return found

    # -- arrivals -------------------------------------------------------------------------------------

    def _arrive_later(self, index: int) -> None:
        if index < len(self._requests):
            due_s = self._requests[index].arrival_s / self.options.rate_scale
            self.events.at(due_s, lambda: self._arrive(index))

    def _arrive(self, index: int) -> None:
        request = self._requests[index]
        outcome = Outcome(
            index=request.index,
            arrival_s=self.events.now_s,
            num_tokens=request.num_tokens,
            num_output_tokens=request.num_output_tokens,
        )
        self.outcomes.append(outcome)
        live = _Live(request, self._rng.choice(self.gateways), outcome)
        live.units = request.prompt_units(self.options.shape.grain)
        live.block_hashes = self._hasher.chain(live.units)
        self._live[str(request.index)] = live
        self.events.after(self.options.delays.lookup_s, lambda: self._start_attempt(live))
        self._arrive_later(index + 1)

    @property
    def _is_busy(self) -> bool:
        """Whether anybody still does something for a request whose client has all it asked for."""
        return any(worker.scheduler.requests() for worker in self.workers) or not all(
            gateway.is_idle for gateway in self.gateways
        )

    # -- an attempt ------------------------------------------------------------------------------------

    def _start_attempt(self, live: _Live) -> None:
        live.attempt += 1
        placement = live.placement = live.gateway.place(live.request, live.block_hashes, live.attempt)
        live.outcome.num_attempts = live.attempt
        live.outcome.is_local = placement.decision.prefill is None
        decode = self.workers[placement.slots[-1]]
        prefill = self.workers[placement.slots[0]]
        if prefill is decode:
            legs: list[tuple[SimWorker, Phase, SimWorker | None]] = [(decode, "both", None)]
        else:
            legs = [(decode, "decode", prefill), (prefill, "prefill", decode)]
        for worker, phase, peer in legs:
            submit = self._submission(live, worker, phase, peer)
            self.events.after(self.options.delays.hop_s, partial(self._submit, worker, submit))

    def _submission(self, live: _Live, worker: SimWorker, phase: Phase, peer: SimWorker | None) -> Submit:
        return Submit(
            request_id=str(live.request.index),
            attempt=live.attempt,
            epoch=worker.ref.epoch,
            phase=phase,
            token_ids=live.units + live.emitted,
            num_prompt_tokens=len(live.units),
            sampling=SamplingParams(max_tokens=live.request.answer_units(self.options.shape.grain)),
            peer=peer.ref if peer is not None else None,
            block_hashes=live.block_hashes,
        )

    def _submit(self, worker: SimWorker, submit: Submit) -> None:
        request = worker.submit(submit)
        if submit.phase == "prefill":
            self._senders[worker.slot].begin(request)

    def _on_reserved(self, worker: SimWorker, requests: list[Request]) -> None:
        for request in requests:
            ready = partial(self._ready, request.key, request.num_computed_tokens)
            self.events.after(self.options.delays.hop_s, ready)

    def _ready(self, key: OwnerKey, held_units: int) -> None:
        live = self._current(key)
        if live is not None and live.placement is not None:
            self._senders[live.placement.slots[0]].ready(key, held_units)

    def _on_step(self, worker: SimWorker, done: StepDone) -> None:
        sender = self._senders.get(worker.slot)
        if sender is not None:
            for request, num_units in done.computed:
                if request.phase == "prefill":
                    sender.computed(request.key, num_units)
        for request in done.made:
            live = self._current(request.key)
            if live is None:
                continue
            unit = request.token_ids[-1]
            live.emitted.append(unit)
            if len(request.token_ids) == request.num_submitted_tokens + 1:  # the first since the prompt
                self._first_token(live, request, done.prompt_done_s)
            if request.status is Status.ENDED:
                self.events.after(self.options.delays.hop_s, partial(self._finished, live))
            elif request.phase == "prefill" and sender is not None:
                sender.made(request.key, [unit])

    def _first_token(self, live: _Live, request: Request, at_s: float) -> None:
        """The prompt is computed. After another attempt failed the client has had its first token already."""
        assert live.placement is not None
        outcome = live.outcome
        if outcome.first_token_s < 0:
            outcome.first_token_s = at_s + self.options.delays.hop_s
            cached = request.num_cached_tokens * self.options.shape.grain
            outcome.cached_tokens = min(cached, outcome.num_tokens - 1)
        prefilled = partial(live.gateway.prefilled, live.placement)
        self.events.at(at_s + self.options.delays.hop_s, prefilled)

    def _handed_over(self, prefill: SimWorker, key: OwnerKey, units: list[int]) -> None:
        prefill.end(key)
        live = self._current(key)
        if live is not None and live.placement is not None:
            over = partial(live.gateway.leg_over, live.placement, prefill.slot)
            self.events.after(self.options.delays.hop_s, over)
            self.workers[live.placement.slots[-1]].received(key, units)

    def _finished(self, live: _Live) -> None:
        """The client has everything; whoever still holds something of the request lets go."""
        live.outcome.finished_s = self.events.now_s
        live.outcome.num_ends += 1
        self._num_left -= 1
        del self._live[str(live.request.index)]
        self._let_go(live)

    def _let_go(self, live: _Live) -> None:
        placement = live.placement
        assert placement is not None
        key = (str(live.request.index), live.attempt)
        live.gateway.prefilled(placement)
        for slot in placement.slots:
            live.gateway.leg_over(placement, slot)
            self.events.after(self.options.delays.hop_s, partial(self._abort, slot, key))

    def _abort(self, slot: int, key: OwnerKey) -> None:
        self.workers[slot].end(key)
        if slot in self._senders:
            self._senders[slot].drop(key)

    def _current(self, key: OwnerKey) -> _Live | None:
        """The request, unless it is over or on another attempt."""
        live = self._live.get(key[0])
        return live if live is not None and live.attempt == key[1] else None

    # -- pages held in vain ----------------------------------------------------------------------------

    def _on_short(self, worker: SimWorker) -> None:
        if worker.slot in self._senders and worker.slot not in self._ticking:
            self._ticking.add(worker.slot)
            self.events.after(_TICK_S, partial(self._tick, worker))

    def _tick(self, worker: SimWorker) -> None:
        """What the engine does with a request in the way: it fails retryably, and goes elsewhere or again."""
        self._ticking.remove(worker.slot)
        if not worker.scheduler.short_of_pages:
            return
        key = self._senders[worker.slot].in_the_way(lambda request: request.status is Status.WAITING)
        live = self._current(key) if key is not None else None
        if live is not None:
            self._let_go(live)
            self.events.after(self.options.delays.lookup_s, partial(self._start_attempt, live))
        self._on_short(worker)

    def _worker(self, slot: int, role: Role) -> SimWorker:
        return SimWorker(
            slot,
            role,
            self.options,
            self.events,
            self._hasher,
            on_step=self._on_step,
            on_reserved=self._on_reserved,
            on_short=self._on_short,
            on_load=lambda worker: self._news.on_load(worker),
            on_tree=self.index.publish,
        )


def _policy(name: str) -> RoutingPolicy:
    """Raises `ConfigError` for a policy that the gateway doesn't have."""
    try:
        policy: RoutingPolicy = msgspec.convert(name, RoutingPolicy)
    except msgspec.ValidationError:
        known = ", ".join(get_args(RoutingPolicy))
        raise ConfigError(f"there is no policy {name!r}: one of {known}") from None
    return policy

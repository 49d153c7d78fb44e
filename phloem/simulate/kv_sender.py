"""The sending side of hand-overs: when the KV of a request has reached its decode worker.

One sender per prefill worker, first come first served at one bandwidth. What a chunk computed leaves once
the chunk is computed and the decode side has pages; what decode holds already is never sent.
"""

from __future__ import annotations

from collections.abc import Callable

from phloem.shared.engine.kv_pool import OwnerKey
from phloem.shared.engine.requests import Request
from phloem.simulate.events import EventQueue

STARVED_S = 1.0  # as the engine's: after so long a request held in vain gives its pages up


class _Plan:
    def __init__(self, request: Request) -> None:
        self.request = request
        self.computed_units = 0
        self.sent_units = 0
        self.ready_at_s: float | None = None
        self.made: list[int] | None = None


class KvSender:
    """Calls `on_sent(key, units made)` when all KV of a request is on the decode side."""

    def __init__(
        self,
        events: EventQueue,
        unit_bytes: int,
        bytes_per_s: float,
        latency_s: float,
        on_sent: Callable[[OwnerKey, list[int]], None],
    ) -> None:
        self._events = events
        self._unit_s = unit_bytes / bytes_per_s
        self._latency_s = latency_s
        self._on_sent = on_sent
        self._plans: dict[OwnerKey, _Plan] = {}
        self._early: dict[OwnerKey, int] = {}
        self._free_at_s = 0.0
        self.num_units_sent = 0

    @property
    def is_empty(self) -> bool:
        return not self._plans and not self._early

    def begin(self, request: Request) -> None:
        plan = self._plans[request.key] = _Plan(request)
        held = self._early.pop(request.key, None)
        if held is not None:
            self._ready(plan, held)

    def ready(self, key: OwnerKey, held_units: int) -> None:
        """Decode has pages, and the first `held_units`. It may say so before our submission is here."""
        plan = self._plans.get(key)
        if plan is None:
            self._early[key] = held_units
        else:
            self._ready(plan, held_units)

    def computed(self, key: OwnerKey, num_units: int) -> None:
        plan = self._plans.get(key)
        if plan is not None:
            plan.computed_units = num_units
            self._pump(plan)

    def made(self, key: OwnerKey, units: list[int]) -> None:
        """The prompt is computed; `units` go along."""
        plan = self._plans.get(key)
        if plan is not None:
            plan.made = units
            self._pump(plan)

    def drop(self, key: OwnerKey) -> None:
        """The request ended for another reason."""
        self._plans.pop(key, None)
        self._early.pop(key, None)

    def in_the_way(self, is_waiting: Callable[[Request], bool]) -> OwnerKey | None:
        """The youngest request that waits for room at its decode worker while others, for which decode holds
        room, have long waited here for pages: it must give its own up, or both sides wait for each other."""
        ready = [plan for plan in self._plans.values() if plan.ready_at_s is not None]
        before_s = self._events.now_s - STARVED_S
        starved = any(plan.ready_at_s is not None and plan.ready_at_s <= before_s for plan in ready)
        if not starved or any(not is_waiting(plan.request) for plan in ready):
            return None
        held = [key for key, plan in self._plans.items() if plan.made is not None and plan.ready_at_s is None]
        return held[-1] if held else None

    def _ready(self, plan: _Plan, held_units: int) -> None:
        plan.ready_at_s = self._events.now_s
        plan.sent_units = held_units
        self._pump(plan)

    def _pump(self, plan: _Plan) -> None:
        """Books what is computed and wanted on the link; the last of it carries the made units."""
        if plan.ready_at_s is None:
            return
        units = max(0, plan.computed_units - plan.sent_units)
        plan.sent_units += units
        self.num_units_sent += units
        self._free_at_s = max(self._free_at_s, self._events.now_s) + units * self._unit_s
        made = plan.made
        if made is not None:
            key = plan.request.key
            del self._plans[key]
            self._events.at(self._free_at_s + self._latency_s, lambda: self._on_sent(key, made))

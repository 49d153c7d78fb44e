"""One gateway: what it knows of the cluster, and where it sends requests.

It knows the workers' heartbeats as of its last poll, what it has under way itself, what it placed lately
(the gateway's own `RecentPlacements`), and what the index answers. The decision is `route`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from phloem.services.gateway.cluster.recent_placements import RecentPlacements
from phloem.services.gateway.cluster.routing import (
    Candidate,
    Decision,
    RoutingPolicy,
    RoutingRequest,
    route,
)
from phloem.services.gateway.cluster.told_load import ToldLoad
from phloem.shared.block_hash import BLOCK_TOKENS
from phloem.shared.protocol.cluster import WorkerLoad, WorkerRecord
from phloem.shared.protocol.session import PeerRef
from phloem.simulate.events import EventQueue
from phloem.simulate.index import SimIndex
from phloem.simulate.workload import SimRequest

MAX_NEW_TOKENS = 4096  # what clients ask for; how long an answer will be is not known when it is routed


class Placement:
    """An attempt under way: who holds a leg of it, and who computes its prompt."""

    def __init__(self, decision: Decision, slots: tuple[int, ...], num_prefill_tokens: int) -> None:
        self.decision = decision
        self.slots = slots  # prefill first, where there are two
        self.open_slots = set(slots)
        self.num_prefill_tokens = num_prefill_tokens


class SimGateway:
    """Decides, and keeps count of its own requests as the gateway's request table does."""

    def __init__(
        self,
        policy: RoutingPolicy,
        events: EventQueue,
        index: SimIndex,
        refs: Sequence[PeerRef],
        records: Sequence[WorkerRecord],
        block_tokens: int,
    ) -> None:
        self._policy: RoutingPolicy = policy
        self._index = index
        self._events = events
        self._slots = {ref: slot for slot, ref in enumerate(refs)}
        self._block_tokens = block_tokens
        self._recent = RecentPlacements(_clock_of(events))
        self._records: list[WorkerRecord] = list(records)
        self._told = [ToldLoad() for _ in refs]
        # Since a worker last told its load: placements there, and the tokens that each has it compute.
        self._new: list[dict[Placement, int]] = [{} for _ in refs]
        self._own_requests = [0] * len(refs)
        self._own_prefill_tokens = [0] * len(refs)
        self._sequence = 0

    def poll(self, records: Sequence[WorkerRecord]) -> None:
        """The workers' last heartbeats, by slot; a load that a worker told itself lately is newer."""
        now_s = self._events.now_s
        for slot, heartbeat in enumerate(records):
            self._records[slot] = self._told[slot].latest(heartbeat, now_s)
            if self._records[slot] is heartbeat:
                self._new[slot].clear()

    def heard(self, slot: int, load: WorkerLoad) -> None:
        """A worker's load, over its session."""
        self._told[slot].note(load, self._events.now_s)
        self._records[slot] = msgspec.structs.replace(self._records[slot], load=load)
        self._new[slot].clear()

    def place(self, request: SimRequest, block_hashes: list[bytes], attempt: int) -> Placement:
        """Where the attempt goes; it counts as under way from now on."""
        self._sequence += 1
        cached = self._cached_tokens(block_hashes)
        asked = RoutingRequest(
            request_id=str(request.index),
            num_tokens=request.num_tokens,
            max_new_tokens=MAX_NEW_TOKENS,
            sequence=self._sequence,
            attempt=attempt,
        )
        decision = route(self._policy, asked, self._candidates(cached, request.num_tokens))
        assert decision is not None, "the cluster has a worker that decodes"
        prefiller = decision.prefill or decision.decode
        self._recent.note(block_hashes, prefiller)
        self._index.announce(self._slots[prefiller], block_hashes)
        slots = tuple(self._slots[ref] for ref in (decision.prefill, decision.decode) if ref is not None)
        lacking = max(1, request.num_tokens - cached.get(slots[0], 0))
        placement = Placement(decision, slots, lacking)
        for slot in slots:
            self._own_requests[slot] += 1
            self._new[slot][placement] = lacking if slot == slots[0] else 0
        self._own_prefill_tokens[slots[0]] += lacking
        return placement

    def prefilled(self, placement: Placement) -> None:
        """Its first token is here."""
        self._own_prefill_tokens[placement.slots[0]] -= placement.num_prefill_tokens
        placement.num_prefill_tokens = 0
        if placement in self._new[placement.slots[0]]:
            self._new[placement.slots[0]][placement] = 0

    def leg_over(self, placement: Placement, slot: int) -> None:
        """A worker is done with the attempt, or was told to give it up."""
        if slot in placement.open_slots:
            placement.open_slots.remove(slot)
            self._own_requests[slot] -= 1
            self._new[slot].pop(placement, None)

    @property
    def is_idle(self) -> bool:
        return not any(self._own_requests) and not any(self._own_prefill_tokens)

    def _cached_tokens(self, block_hashes: list[bytes]) -> dict[int, int]:
        """By slot, what trees hold, or will soon: as gateways announced, or this one placed a moment ago."""
        blocks = self._index.match(block_hashes)
        recent = self._recent.cached_tokens(block_hashes)
        placed = {self._slots[ref]: num_tokens // BLOCK_TOKENS for ref, num_tokens in recent.items()}
        for soon in (self._index.announced(block_hashes), placed):
            for slot, count in soon.items():
                blocks[slot] = max(count, blocks.get(slot, 0))
        return {slot: count * self._block_tokens for slot, count in blocks.items()}

    def _candidates(self, cached: dict[int, int], num_tokens: int) -> list[Candidate]:
        return [
            Candidate(
                record=record,
                own_requests=self._own_requests[slot],
                own_prefill_tokens=self._own_prefill_tokens[slot],
                new_requests=len(self._new[slot]),
                new_prefill_tokens=sum(self._new[slot].values()),
                cached_tokens=min(cached.get(slot, 0), num_tokens),
            )
            for slot, record in enumerate(self._records)
        ]


def _clock_of(events: EventQueue) -> Callable[[], float]:
    return lambda: events.now_s

"""What a routing decision is made from, and what comes out of it."""

from __future__ import annotations

from typing import Literal, TypeAlias

from msgspec import Struct

from phloem.shared.protocol.cluster import WorkerRecord
from phloem.shared.protocol.session import PeerRef

RoutingPolicy: TypeAlias = Literal["cost", "prefix", "least_loaded", "round_robin", "random", "cache_aware"]


# `local`: a decode worker prefills for itself.
RouteKind: TypeAlias = Literal["pair", "local", "unified"]


class Candidate(Struct, frozen=True, kw_only=True):
    """A worker that takes requests now, with what this gateway itself has under way there, and how many
    leading tokens of the prompt it holds. `new_...` is the part of `own_...` that went there since the worker
    told the load in `record`, so that others' requests and these add up."""

    record: WorkerRecord
    own_requests: int = 0
    own_prefill_tokens: int = 0
    new_requests: int = 0
    new_prefill_tokens: int = 0
    cached_tokens: int = 0

    @property
    def ref(self) -> PeerRef:
        return PeerRef(self.record.worker_id, self.record.epoch)

    def reaches(self, decode: Candidate) -> bool:
        """Whether a KV channel with this decode worker is open, or may open at any time; roles apart."""
        return decode.record.worker_id not in self.record.load.cut_off

    @property
    def kind_alone(self) -> RouteKind:
        """What it is called when it does both phases."""
        return "unified" if self.record.role == "unified" else "local"

    @property
    def num_requests(self) -> int:
        """Requests that it has, at least."""
        load = self.record.load
        known = load.num_running + load.num_waiting + load.num_handing_over + self.new_requests
        return known if known > self.own_requests else self.own_requests

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that it has yet to compute, at least."""
        known = self.record.load.queued_tokens + self.new_prefill_tokens
        return known if known > self.own_prefill_tokens else self.own_prefill_tokens


class CacheAwareThresholds(Struct, frozen=True):
    """Of the policy `cache_aware`; the defaults are those that SGLang's router starts with."""

    cache_threshold: float = 0.3
    balance_abs_threshold: int = 64
    balance_rel_threshold: float = 1.5


class RoutingRequest(Struct, frozen=True, kw_only=True):
    """`sequence` counts this gateway's requests (round robin). `num_explained`: how many workers of each side
    the decision lists with their terms, the best first; 0: no explanation."""

    request_id: str
    num_tokens: int
    max_new_tokens: int
    sequence: int = 0
    attempt: int = 1
    thresholds: CacheAwareThresholds = CacheAwareThresholds()
    num_explained: int = 0


Part: TypeAlias = Literal["prefill", "decode", "both"]


class RankedWorker(Struct, frozen=True, kw_only=True, gc=False):
    """One worker in one part: `terms` are seconds with `cost`, else what the policy compares, in order."""

    worker: PeerRef
    cached_tokens: int
    terms: dict[str, float]


class Ranking(Struct, frozen=True, kw_only=True, gc=False):
    """The best of the workers that could take one part of the request, out of `num_workers`."""

    part: Part
    num_workers: int
    best: list[RankedWorker]


class Decision(Struct, frozen=True, kw_only=True):
    """`prefill` is None when `decode` does both phases. `terms` are the cost by name, in seconds, or what
    another policy compared. `num_options` counts the pairs and single workers to choose from.

    `cached_tokens` of the prompt the worker that prefills holds, as far as the gateway knows;
    `best_cached_tokens` the best that any worker could have offered.
    """

    decode: PeerRef
    prefill: PeerRef | None = None
    kind: RouteKind = "pair"
    policy: RoutingPolicy
    terms: dict[str, float]
    num_options: int = 1
    num_tokens: int = 0
    cached_tokens: int = 0
    best_cached_tokens: int = 0
    rankings: list[Ranking] = []

    @property
    def prefiller(self) -> PeerRef:
        """The worker that computes the prompt."""
        return self.prefill or self.decode

    @property
    def cost_s(self) -> float:
        """The sum of the terms; seconds with policy `cost`."""
        return sum(self.terms.values())

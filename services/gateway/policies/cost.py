"""Policy `cost`: the pair, or the single worker, that is cheapest in seconds.

P x D pairs are not looked at one by one. A worker is out when another of its side is no worse both in its
fixed cost and in its share of the transfer; what is left on each side is a handful, and their pairs hold the
cheapest of all pairs, exactly: rounding of sums and products never turns "no worse" around.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from operator import attrgetter
from typing import NamedTuple, TypeAlias, TypeVar

from phloem.services.gateway.policies.cost_model import (
    AloneCost,
    CostModel,
    DecodeCost,
    Norms,
    PrefillCost,
    pair_cost_s,
    pair_terms,
)
from phloem.services.gateway.policies.ranking import best_workers, ranked
from phloem.services.gateway.policies.snapshot import Candidate, Decision, Ranking, RoutingRequest
from phloem.services.gateway.policies.ties import Draw

# What orders two options: cost; one worker before two; the lesser fixed and transfer costs; the draws.
Key: TypeAlias = tuple[float, ...]
Side = TypeVar("Side", PrefillCost, DecodeCost)
# Read from every worker at every request.
_FIXED_S, _SHARE, _TOTAL_S = attrgetter("fixed_s"), attrgetter("share"), attrgetter("total_s")


class Option(NamedTuple):
    """One way to serve the request."""

    key: Key
    prefill: PrefillCost | None
    decode: DecodeCost
    terms: Callable[[], dict[str, float]]


def choose_cheapest(request: RoutingRequest, candidates: Sequence[Candidate]) -> Decision | None:
    """The cheapest option, or None when no worker can decode."""
    model, draw = CostModel(request, Norms.of(candidates)), Draw(request)
    decodes = [model.decode(worker) for worker in candidates if worker.record.role != "prefill"]
    prefills = [model.prefill(worker) for worker in candidates if worker.record.role != "decode"]
    if not decodes:
        return None
    alone = [model.alone(decode) for decode in decodes]
    pools = hand_over_pools(prefills, decodes)
    pairs = [_cheapest_pair(givers, takers, draw) for givers, takers in pools]
    cheapest_pair = min(pairs, key=lambda option: option.key, default=None)
    best = _cheapest_alone(alone, draw, cheapest_pair)
    return Decision(
        decode=best.decode.worker.ref,
        prefill=best.prefill.worker.ref if best.prefill is not None else None,
        kind=best.decode.worker.kind_alone if best.prefill is None else "pair",
        policy="cost",
        terms=best.terms(),
        num_options=len(alone) + sum(len(givers) * len(takers) for givers, takers in pools),
        num_tokens=request.num_tokens,
        cached_tokens=(best.prefill or best.decode).worker.cached_tokens,
        best_cached_tokens=max(worker.cached_tokens for worker in candidates),
        rankings=_rankings(request.num_explained, prefills, decodes, alone),
    )


def hand_over_pools(
    prefills: Sequence[PrefillCost], decodes: Sequence[DecodeCost]
) -> list[tuple[list[PrefillCost], list[DecodeCost]]]:
    """All pairs that can exchange KV, as products: KV moves between equal layouts, to a worker that listens
    and that the giver is not cut off from. Two unified workers never pair: each does both phases, and they
    open no channel."""
    pools = []
    for layout in sorted({cost.worker.record.kv_layout for cost in prefills}):
        givers = [cost for cost in prefills if cost.worker.record.kv_layout == layout]
        takers = [
            cost
            for cost in decodes
            if cost.worker.record.kv_layout == layout and cost.worker.record.transfer_address
        ]
        unified = [cost for cost in givers if cost.worker.record.role == "unified"]
        pools += _by_reach([cost for cost in givers if cost.worker.record.role == "prefill"], takers)
        pools += _by_reach(unified, [cost for cost in takers if cost.worker.record.role == "decode"])
    return [pool for pool in pools if pool[0] and pool[1]]


def _by_reach(
    givers: list[PrefillCost], takers: list[DecodeCost]
) -> list[tuple[list[PrefillCost], list[DecodeCost]]]:
    """The same as products of those who have a channel or may get one: one product, as a rule."""
    if not any(cost.worker.record.load.cut_off for cost in givers):
        return [(givers, takers)]
    alike: dict[frozenset[str], list[PrefillCost]] = {}
    for cost in givers:
        alike.setdefault(frozenset(cost.worker.record.load.cut_off), []).append(cost)
    return [
        (members, [taker for taker in takers if members[0].worker.reaches(taker.worker)])
        for members in alike.values()
    ]


def alone_key(cost: AloneCost, draw: Draw) -> Key:
    """What orders a single worker among all options."""
    return (cost.total_s, 0.0, 0.0, 0.0, 0.0, 0.0, draw.of(cost.decode.worker))


def pair_key(prefill: PrefillCost, decode: DecodeCost, draw: Draw) -> Key:
    """What orders a pair among all options."""
    return (
        pair_cost_s(prefill, decode),
        1.0,
        prefill.fixed_s,
        prefill.share,
        decode.fixed_s,
        decode.share,
        draw.of(prefill.worker),
        draw.of(decode.worker),
    )


def _cheapest_alone(costs: Sequence[AloneCost], draw: Draw, pair: Option | None) -> Option:
    """The cheapest single worker, or `pair` when that is cheaper."""
    least = min(map(_TOTAL_S, costs))
    if pair is not None and pair.key[0] < least:
        return pair
    equals = [cost for cost in costs if cost.total_s == least]
    best = equals[draw.lowest([cost.decode.worker for cost in equals])]
    return Option(alone_key(best, draw), None, best.decode, best.terms)


def _cheapest_pair(prefills: Sequence[PrefillCost], decodes: Sequence[DecodeCost], draw: Draw) -> Option:
    pairs = product(_undominated(prefills, draw), _undominated(decodes, draw))
    key, prefill, decode = min(
        ((pair_key(prefill, decode, draw), prefill, decode) for prefill, decode in pairs),
        key=lambda pair: pair[0],
    )
    return Option(key, prefill, decode, lambda: pair_terms(prefill, decode))


def _undominated(costs: Sequence[Side], draw: Draw) -> list[Side]:
    """Those that no other beats or equals both in what is fixed and in its share; of equals the one drawn."""
    left, kept = list(costs), []
    while left:
        fixed_s = min(map(_FIXED_S, left))
        equals = [cost for cost in left if cost.fixed_s == fixed_s]
        share = min(map(_SHARE, equals))
        equals = [cost for cost in equals if cost.share == share]
        kept.append(equals[draw.lowest([cost.worker for cost in equals])])
        left = [cost for cost in left if cost.share < share]
    return kept


def _rankings(
    count: int, prefills: list[PrefillCost], decodes: list[DecodeCost], alone: list[AloneCost]
) -> list[Ranking]:
    if not count:
        return []
    return [
        best_workers("prefill", count, prefills, _FIXED_S, lambda cost: ranked(cost.worker, cost.terms())),
        best_workers("decode", count, decodes, _FIXED_S, lambda cost: ranked(cost.worker, cost.terms())),
        best_workers("both", count, alone, _TOTAL_S, lambda cost: ranked(cost.decode.worker, cost.terms())),
    ]

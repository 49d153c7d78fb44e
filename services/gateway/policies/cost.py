"""Policy `cost`: the pair, or the single worker, that is cheapest in seconds.

P x D pairs are not looked at one by one. A worker is out when another of its side is no worse both in its
fixed cost and in its share of the transfer; what is left on each side is a handful, and their pairs hold the
cheapest of all pairs, exactly: rounding of sums and products never turns "no worse" around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
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
from phloem.services.gateway.policies.pools import hand_over_pools
from phloem.services.gateway.policies.ranking import best_workers
from phloem.services.gateway.policies.snapshot import Candidate, Decision, Ranking, RoutingRequest
from phloem.services.gateway.policies.ties import Draw

# What orders two options: cost; one worker before two; the lesser fixed and transfer costs; the draws.
Key: TypeAlias = tuple[float, ...]
Side = TypeVar("Side", PrefillCost, DecodeCost)


class Option(NamedTuple):
    """One way to serve the request."""

    key: Key
    prefill: PrefillCost | None
    decode: DecodeCost
    terms: Callable[[], dict[str, float]]


def choose_cheapest(request: RoutingRequest, candidates: Sequence[Candidate]) -> Decision | None:
    """The cheapest option, or None when no worker can decode."""
    model, draw = CostModel(request, Norms.of(candidates)), Draw(request)
    decodes = {id(c): model.decode(c) for c in candidates if c.record.role != "prefill"}
    if not decodes:
        return None
    alone = [model.alone(decode) for decode in decodes.values()]
    prefills: dict[int, PrefillCost] = {}
    options = [_cheapest_alone(alone, draw)]
    num_options = len(alone)
    for pool in hand_over_pools(candidates):
        prefills |= {id(worker): model.prefill(worker) for worker in pool.prefill}
        options.append(
            _cheapest_pair(
                [prefills[id(worker)] for worker in pool.prefill],
                [decodes[id(worker)] for worker in pool.decode],
                draw,
            )
        )
        num_options += len(pool.prefill) * len(pool.decode)
    best = min(options, key=lambda option: option.key)
    prefiller = (best.prefill or best.decode).worker
    return Decision(
        decode=best.decode.worker.ref,
        prefill=best.prefill.worker.ref if best.prefill is not None else None,
        policy="cost",
        terms=best.terms(),
        num_options=num_options,
        num_tokens=request.num_tokens,
        cached_tokens=prefiller.cached_tokens,
        best_cached_tokens=max(worker.cached_tokens for worker in candidates),
        rankings=_rankings(request.num_explained, prefills.values(), decodes.values(), alone),
    )


def alone_key(cost: AloneCost, draw: Draw) -> Key:
    return (cost.total_s, 0.0, 0.0, 0.0, 0.0, 0.0, draw.of(cost.decode.worker))


def pair_key(prefill: PrefillCost, decode: DecodeCost, draw: Draw) -> Key:
    return (
        pair_cost_s(prefill, decode),
        1.0,
        prefill.fixed_s,
        prefill.s_per_byte,
        decode.fixed_s,
        decode.num_bytes,
        draw.of(prefill.worker),
        draw.of(decode.worker),
    )


def _cheapest_alone(costs: Sequence[AloneCost], draw: Draw) -> Option:
    least = min(cost.total_s for cost in costs)
    best = min((c for c in costs if c.total_s == least), key=lambda cost: alone_key(cost, draw))
    return Option(alone_key(best, draw), None, best.decode, best.terms)


def _cheapest_pair(prefills: Sequence[PrefillCost], decodes: Sequence[DecodeCost], draw: Draw) -> Option:
    pairs = product(_undominated(prefills, draw), _undominated(decodes, draw))
    key, prefill, decode = min(
        ((pair_key(prefill, decode, draw), prefill, decode) for prefill, decode in pairs),
        key=lambda pair: pair[0],
    )
    return Option(key, prefill, decode, lambda: pair_terms(prefill, decode))


def _undominated(costs: Sequence[Side], draw: Draw) -> list[Side]:
    """Those that no other beats or equals in both of their first two fields; of equals the one drawn."""
    left, kept = list(costs), []
    while left:
        fixed_s, share = min((cost[0], cost[1]) for cost in left)
        equals = [cost for cost in left if cost[0] == fixed_s and cost[1] == share]
        kept.append(min(equals, key=lambda cost: draw.of(cost.worker)) if len(equals) > 1 else equals[0])
        left = [cost for cost in left if cost[1] < share]
    return kept


def _rankings(
    count: int, prefills: Iterable[PrefillCost], decodes: Iterable[DecodeCost], alone: Sequence[AloneCost]
) -> list[Ranking]:
    if not count:
        return []
    return [
        best_workers("prefill", count, [(c.fixed_s, c.worker, c.terms) for c in prefills]),
        best_workers("decode", count, [(c.fixed_s, c.worker, c.terms) for c in decodes]),
        best_workers("both", count, [(c.total_s, c.decode.worker, c.terms) for c in alone]),
    ]

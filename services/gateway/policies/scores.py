"""Policies that score each side of a pool by itself; the lowest score of each side wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from phloem.services.gateway.policies.pools import Pool, simple_pools
from phloem.services.gateway.policies.ranking import best_workers, ranked
from phloem.services.gateway.policies.snapshot import (
    Candidate,
    Decision,
    Part,
    RankedWorker,
    Ranking,
    RoutingPolicy,
    RoutingRequest,
)
from phloem.services.gateway.policies.ties import Draw

Score: TypeAlias = tuple[float, ...]


class Scores(NamedTuple):
    """For each side the names of what is compared, in order, and the numbers of each worker; lower is better.
    Equal scores are told apart by `Draw`."""

    prefill_names: tuple[str, ...]
    prefill: list[Score]
    decode_names: tuple[str, ...]
    decode: list[Score]


ScorePool: TypeAlias = Callable[[RoutingRequest, Pool], Scores]


class _Best(NamedTuple):
    worker: Candidate
    terms: dict[str, float]


def choose_by_scores(
    policy: RoutingPolicy, score: ScorePool, request: RoutingRequest, candidates: Sequence[Candidate]
) -> Decision | None:
    """The best worker of each side, or None when no worker can decode.

    Several layouts, or unified workers beside pairs, are several pools: these policies take turns between
    them, by the number of workers that decode there.
    """
    pools = simple_pools(sorted(candidates, key=lambda candidate: candidate.record.worker_id))
    if not pools:
        return None
    pool = _pool_in_turn(pools, request.sequence)
    scores, draw = score(request, pool), Draw(request)
    decode = _best(scores.decode_names, scores.decode, pool.decode, draw)
    prefill = _best_giver(scores, pool.prefill, decode.worker, draw) if pool.prefill else None
    return Decision(
        decode=decode.worker.ref,
        prefill=prefill.worker.ref if prefill is not None else None,
        kind=decode.worker.kind_alone if prefill is None else "pair",
        policy=policy,
        terms=_prefixed("decode", decode) | (_prefixed("prefill", prefill) if prefill is not None else {}),
        num_options=sum(len(pool.decode) * max(1, len(pool.prefill)) for pool in pools),
        num_tokens=request.num_tokens,
        cached_tokens=(prefill or decode).worker.cached_tokens,
        best_cached_tokens=max(worker.cached_tokens for worker in candidates),
        rankings=_rankings(request.num_explained, pool, scores),
    )


def _pool_in_turn(pools: Sequence[Pool], sequence: int) -> Pool:
    turn = sequence % sum(len(pool.decode) for pool in pools)
    for pool in pools:
        if turn < len(pool.decode):
            return pool
        turn -= len(pool.decode)
    raise AssertionError("a turn is less than the number of decoding workers")


def _best(names: tuple[str, ...], scores: list[Score], workers: Sequence[Candidate], draw: Draw) -> _Best:
    least = min(scores)
    equals = [worker for worker, score in zip(workers, scores, strict=True) if score == least]
    return _Best(equals[draw.lowest(equals)], dict(zip(names, least, strict=True)))


def _best_giver(scores: Scores, workers: Sequence[Candidate], decode: Candidate, draw: Draw) -> _Best:
    """Of the prefill workers that are not cut off from the decode worker."""
    within = [n for n, worker in enumerate(workers) if worker.reaches(decode)]
    return _best(
        scores.prefill_names, [scores.prefill[n] for n in within], [workers[n] for n in within], draw
    )


def _prefixed(side: str, best: _Best) -> dict[str, float]:
    return {f"{side}_{name}": number for name, number in best.terms.items()}


def _rankings(count: int, pool: Pool, scores: Scores) -> list[Ranking]:
    if not count:
        return []
    rankings = []
    if pool.prefill:
        rankings.append(_ranking("prefill", count, scores.prefill_names, scores.prefill, pool.prefill))
    decoded: Part = "decode" if pool.prefill else "both"
    rankings.append(_ranking(decoded, count, scores.decode_names, scores.decode, pool.decode))
    return rankings


def _ranking(
    part: Part, count: int, names: tuple[str, ...], scores: list[Score], workers: Sequence[Candidate]
) -> Ranking:
    def told(entry: tuple[Score, Candidate]) -> RankedWorker:
        score, worker = entry
        return ranked(worker, dict(zip(names, score, strict=True)))

    entries = list(zip(scores, workers, strict=True))
    return best_workers(part, count, entries, lambda entry: entry[0], told)

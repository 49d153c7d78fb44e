"""The explanation of a decision: the best workers for each part, with what they were compared by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import nsmallest
from typing import Any, TypeAlias

from phloem.services.gateway.policies.snapshot import Candidate, Part, RankedWorker, Ranking

# Any: floats or tuples of them, alike within one ranking.
Ranked: TypeAlias = tuple[Any, Candidate, Callable[[], dict[str, float]]]


def best_workers(part: Part, count: int, ranked: Sequence[Ranked]) -> Ranking:
    """The `count` lowest of `ranked`: (score, worker, its terms)."""
    best = nsmallest(count, ranked, key=lambda entry: entry[0])
    return Ranking(
        part=part,
        num_workers=len(ranked),
        best=[
            RankedWorker(worker=worker.ref, cached_tokens=worker.cached_tokens, terms=terms())
            for _, worker, terms in best
        ],
    )

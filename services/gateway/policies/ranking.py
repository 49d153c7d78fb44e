"""The explanation of a decision: the best workers for each part, with what they were compared by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import nsmallest
from typing import TypeVar

from phloem.services.gateway.policies.snapshot import Candidate, Part, RankedWorker, Ranking

Entry = TypeVar("Entry")


def best_workers(
    part: Part,
    count: int,
    entries: list[Entry],
    score: Callable[[Entry], float | tuple[float, ...]],
    told: Callable[[Entry], RankedWorker],
) -> Ranking:
    """The `count` entries of the lowest score, the lowest first."""
    best: Iterable[Entry] = nsmallest(count, entries, key=score)
    return Ranking(part=part, num_workers=len(entries), best=[told(entry) for entry in best])


def ranked(worker: Candidate, terms: dict[str, float]) -> RankedWorker:
    """A worker as it is told."""
    return RankedWorker(worker=worker.ref, cached_tokens=worker.cached_tokens, terms=terms)

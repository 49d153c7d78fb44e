"""Which workers can serve a request together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from phloem.services.gateway.policies.snapshot import Candidate


class Pool(NamedTuple):
    """Each of `decode` can be handed over to by some of `prefill`, as a rule by all. No prefill workers: each
    of `decode` does both phases alone."""

    prefill: list[Candidate]
    decode: list[Candidate]


def simple_pools(candidates: Sequence[Candidate]) -> list[Pool]:
    """For policies that know no cost: a prompt is prefilled by a prefill worker, or by a unified one where
    there is none; where it is decoded only when nobody else could. Each worker is in one pool at most."""
    pools: list[Pool] = []
    alone: list[Candidate] = []
    for members in _by_layout(candidates).values():
        prefill = [worker for worker in members if worker.record.role == "prefill"]
        decode = [w for w in members if w.record.role == "decode" and w.record.transfer_address]
        unified = [worker for worker in members if worker.record.role == "unified"]
        if prefill and (decode or unified):
            pools.append(Pool(prefill, decode or [w for w in unified if w.record.transfer_address]))
            alone += unified if decode else []
        elif unified and decode:
            pools.append(Pool(unified, decode))
        else:
            alone += unified
    pools = [reachable for pool in pools if (reachable := _within_reach(pool)).decode]
    if alone:
        pools.append(Pool([], alone))
    return pools or _decoding_alone(candidates)


def _within_reach(pool: Pool) -> Pool:
    """Without the decode workers that all prefill workers are cut off from."""
    if not any(worker.record.load.cut_off for worker in pool.prefill):
        return pool
    return Pool(pool.prefill, [d for d in pool.decode if any(p.reaches(d) for p in pool.prefill)])


def _decoding_alone(candidates: Sequence[Candidate]) -> list[Pool]:
    able = [worker for worker in candidates if worker.record.role != "prefill"]
    return [Pool([], able)] if able else []


def _by_layout(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    groups: dict[str, list[Candidate]] = {}
    for worker in candidates:
        groups.setdefault(worker.record.kv_layout, []).append(worker)
    return groups

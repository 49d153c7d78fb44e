"""Policy `cache_aware`: what SGLang's router does, for comparison.

Read in sgl-project/sglang, folder sgl-router: `src/policies/cache_aware.rs` (commit b6f2064), the trees in
`src/tree.rs`, pairs in `src/routers/http/pd_router.rs`.

- `select_worker`: when max - min of the workers' loads (requests under way) is more than
  `balance_abs_threshold` and max is more than `balance_rel_threshold` x min, the worker with the least load.
  Else the tree's best match: when it covers more than `cache_threshold` of the prompt, its worker; else
  `get_smallest_tenant`, the worker with the smallest tree, whatever its load.
- `select_worker_pair`: prefill by that rule, decode by least load. (The router for pairs can also take
  another policy for decode, such as the lesser of two drawn; the least of all is no worse. A request counts
  as load of both its workers.)
- Thresholds: the launcher (`py_src/sglang_router/router_args.py`, commit 083d601) starts with 0.3, 64 and
  1.5, in mid-2025 it did with 0.5, 32 and 1.0001; the library's own (`src/policies/mod.rs`, commit 08fc574)
  are 0.5, 32 and 1.1. They are flags here, with the launcher's later defaults.

SGLang keeps a tree of the text that it sent to each worker. Here the match and the size of a tree are what
the workers themselves report, which can only help; prompt tokens under way to a worker count as its tree's.
"""

from __future__ import annotations

from collections.abc import Sequence

from phloem.services.gateway.policies.pools import Pool
from phloem.services.gateway.policies.scores import Score, Scores
from phloem.services.gateway.policies.snapshot import CacheAwareThresholds, Candidate, RoutingRequest


def cache_aware(request: RoutingRequest, pool: Pool) -> Scores:
    """Prefill by SGLang's rule, decode by least load; a worker that does both phases by the rule."""
    by_load = [_load(worker) for worker in pool.decode]
    if pool.prefill:
        return Scores(*_rule(request, pool.prefill), ("requests",), by_load)
    return Scores((), [], *_rule(request, pool.decode))


def is_imbalanced(loads: Sequence[int], thresholds: CacheAwareThresholds) -> bool:
    """Whether requests go to the shortest queue whatever anyone has cached."""
    most, least = max(loads), min(loads)
    far = most - least > thresholds.balance_abs_threshold
    return far and most > least * thresholds.balance_rel_threshold


def _rule(request: RoutingRequest, workers: Sequence[Candidate]) -> tuple[tuple[str, ...], list[Score]]:
    if is_imbalanced([worker.num_requests for worker in workers], request.thresholds):
        return ("requests",), [_load(worker) for worker in workers]
    best = max(worker.cached_tokens for worker in workers)
    if best > request.thresholds.cache_threshold * request.num_tokens:
        return ("lacking_tokens",), [(request.num_tokens - worker.cached_tokens,) for worker in workers]
    return ("tree_tokens",), [(_tree_tokens(worker),) for worker in workers]


def _load(worker: Candidate) -> Score:
    return (worker.num_requests,)


def _tree_tokens(worker: Candidate) -> int:
    return worker.record.load.tree_pages * worker.record.page_size + worker.queued_tokens

"""The policies that fit in a line or two; each scores one pool."""

from __future__ import annotations

from math import lcm

from phloem.services.gateway.policies.pools import Pool
from phloem.services.gateway.policies.scores import Scores
from phloem.services.gateway.policies.snapshot import Candidate, RoutingRequest


def prefix(request: RoutingRequest, pool: Pool) -> Scores:
    """The longest prefix wins on either side; of equally long ones the worker with fewer requests."""
    names = ("lacking_tokens", "requests")

    def score(worker: Candidate) -> tuple[float, ...]:
        return (request.num_tokens - worker.cached_tokens, worker.num_requests)

    return Scores(names, [score(w) for w in pool.prefill], names, [score(w) for w in pool.decode])


def least_loaded(request: RoutingRequest, pool: Pool) -> Scores:
    """The fewest requests, running and waiting."""
    names = ("requests",)
    return Scores(
        names, [(w.num_requests,) for w in pool.prefill], names, [(w.num_requests,) for w in pool.decode]
    )


def random(request: RoutingRequest, pool: Pool) -> Scores:
    """Whatever `Draw` says."""
    return Scores((), [()] * len(pool.prefill), (), [()] * len(pool.decode))


def round_robin(request: RoutingRequest, pool: Pool) -> Scores:
    """Each side takes turns, and P x D requests visit each pair once: when both are at their starts again,
    one of them skips a turn."""
    turn, num_prefill, num_decode = request.sequence, len(pool.prefill), len(pool.decode)
    skipped = turn // lcm(num_prefill or 1, num_decode)
    names = ("turns_away",)
    return Scores(
        names,
        [((n - turn - skipped) % num_prefill,) for n in range(num_prefill)],
        names,
        [((n - turn) % num_decode,) for n in range(num_decode)],
    )

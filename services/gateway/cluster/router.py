"""Chooses workers for a request, with what the index, the heartbeats and this gateway itself know."""

from __future__ import annotations

import asyncio
import time

import msgspec

from phloem.services.gateway.cluster.index_client import IndexClient
from phloem.services.gateway.cluster.live_request import LiveRequest
from phloem.services.gateway.cluster.membership import Membership
from phloem.services.gateway.cluster.options import ClusterOptions
from phloem.services.gateway.cluster.recent_placements import RecentPlacements
from phloem.services.gateway.cluster.request import AttemptFailure
from phloem.services.gateway.cluster.request_table import RequestTable
from phloem.services.gateway.cluster.route_log import RouteLog
from phloem.services.gateway.cluster.routing import Candidate, Decision, RoutingRequest, route
from phloem.services.gateway.cluster.routing_metrics import RoutingMetrics
from phloem.services.gateway.policies.snapshot import CacheAwareThresholds
from phloem.services.gateway.route_report import RouteReport
from phloem.shared.errors import PhloemError, unavailable
from phloem.shared.protocol.session import PeerRef

NUM_EXPLAINED = 5  # workers of each side that a decision lists
RETRY_PAUSE_S = 0.1  # before a worker that just failed is asked again, when there is no other


class Router:
    """Gathers what a decision needs, waits for a worker when there is none, and keeps the decisions."""

    def __init__(
        self,
        options: ClusterOptions,
        membership: Membership,
        table: RequestTable,
        index: IndexClient,
        metrics: RoutingMetrics,
    ) -> None:
        self._options = options
        self._membership = membership
        self._table = table
        self._index = index
        self._recent = RecentPlacements(time.monotonic)
        self._metrics = metrics
        self._log = RouteLog()
        self._changed = asyncio.Event()  # replaced by a new one each time it is set

    def on_change(self) -> None:
        """Workers came, went, or changed their state."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def decision(self, request_id: str) -> Decision | None:
        """Where a recent request went last."""
        return self._log.decision(request_id)

    def report(self, request_id: str) -> RouteReport | None:
        """How a recent request was routed; None when it never was, or is forgotten."""
        return self._log.report(request_id)

    def ended(self, live: LiveRequest) -> None:
        """The request is over."""
        report = self._log.ended(live.state)
        if report is not None:
            self._metrics.ended(report)

    async def place(self, live: LiveRequest) -> tuple[Decision, int]:
        """Where the next attempt goes, and how many tokens the worker that prefills has to compute.

        Raises `PhloemError` when no worker appears in time: what the attempt before failed with, or
        `no_decode_workers`.
        """
        cached = await self._cached_tokens(live.block_hashes)
        decision = await self._decide(live, cached)
        prefiller = decision.prefill or decision.decode
        self._recent.note(live.block_hashes, prefiller)
        self._index.announce(live.block_hashes, prefiller)
        return decision, max(1, len(live.state.token_ids) - cached.get(prefiller, 0))

    async def _cached_tokens(self, block_hashes: list[bytes]) -> dict[PeerRef, int]:
        """What each worker holds of the prompt, as the index says, or will hold soon, as gateways
        routed."""
        known = await self._index.lookup(block_hashes)
        cached = dict(known.held)
        for soon in (known.announced, self._recent.cached_tokens(block_hashes)):
            for worker, num_tokens in soon.items():
                cached[worker] = max(num_tokens, cached.get(worker, 0))
        return cached

    async def _decide(self, live: LiveRequest, cached: dict[PeerRef, int]) -> Decision:
        """The cheapest way now; waits for a worker when there is none."""
        wait_s = min(self._options.worker_wait_s, live.state.request.timeout_s - live.elapsed_s)
        give_up_at = time.monotonic() + wait_s
        request = RoutingRequest(
            request_id=live.state.request.request_id,
            num_tokens=len(live.state.token_ids),
            max_new_tokens=max(1, live.state.request.sampling.max_tokens - len(live.state.emitted)),
            sequence=live.sequence,
            attempt=live.state.attempt + 1,
            thresholds=CacheAwareThresholds(
                self._options.cache_threshold,
                self._options.balance_abs_threshold,
                self._options.balance_rel_threshold,
            ),
            num_explained=NUM_EXPLAINED,
        )
        while True:
            candidates = self._candidates(request, cached)
            started_at = time.perf_counter()
            decision = route(self._options.routing_policy, request, _without(candidates, live.avoid))
            seconds = time.perf_counter() - started_at
            if decision is not None:
                self._metrics.decided(decision, seconds)
                self._log.note(live.state, decision, seconds)
                if decision.decode in live.avoid:
                    await asyncio.sleep(RETRY_PAUSE_S)
                return decision
            await self._wait_for_change(give_up_at, live)

    def _candidates(self, request: RoutingRequest, cached: dict[PeerRef, int]) -> list[Candidate]:
        return [
            Candidate(
                record=session.record,
                own_requests=self._table.num_requests(session.ref),
                own_prefill_tokens=self._table.prefill_tokens(session.ref),
                new_requests=self._table.new_requests(session.ref),
                new_prefill_tokens=self._table.new_prefill_tokens(session.ref),
                cached_tokens=min(cached.get(session.ref, 0), request.num_tokens),
            )
            for session in self._membership.routable
        ]

    async def _wait_for_change(self, give_up_at: float, live: LiveRequest) -> None:
        """Returns when the set of workers changed. Raises what the request fails with past `give_up_at`."""
        try:
            async with asyncio.timeout(max(0.0, give_up_at - time.monotonic())):
                await self._changed.wait()
        except TimeoutError:
            raise self._nobody_left(live.state.failure) from None

    def _nobody_left(self, failure: AttemptFailure | None) -> PhloemError:
        """Why a request that no worker takes ends: also what became of it before."""
        missing = self._no_workers()
        if failure is None:
            return missing
        message = f"{failure.error.message}; no other could go on with the request: {missing}"
        return PhloemError.from_info(msgspec.structs.replace(failure.error, message=message))

    def _no_workers(self) -> PhloemError:
        roles = [session.record.role for session in self._membership.live]
        found = f"{len(roles)} prefill worker(s) but " if set(roles) == {"prefill"} else ""
        return unavailable(
            f"the cluster has {found}no decode or unified worker that takes requests: start one with "
            "`phloem serve decode`",
            code="no_decode_workers",
            retry_after_s=2.0,
        )


def _without(candidates: list[Candidate], avoid: set[PeerRef]) -> list[Candidate]:
    """Leaves out prefill workers that failed this request (a decode worker can prefill), and others while
    there is one that has not."""
    kept = [worker for worker in candidates if worker.ref not in avoid]
    if any(worker.record.role != "prefill" for worker in kept):
        return kept
    return kept + [w for w in candidates if w.ref in avoid and w.record.role != "prefill"]

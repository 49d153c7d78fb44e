"""`x-phloem-explain: 1` asks where a request went and why; the response header `x-phloem-route` answers.

A header, so that no body is anything else than OpenAI's; compact JSON, bounded. Of a stream it tells what was
known at the first event, of several sequences it tells the first; `/debug/requests/{id}` tells the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import msgspec
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from msgspec import Struct

from phloem.services.gateway.policies.snapshot import Part, Ranking, RouteKind
from phloem.services.gateway.route_report import RouteReport

EXPLAIN_HEADER = b"x-phloem-explain"
ROUTE_HEADER = b"x-phloem-route"
NUM_CANDIDATES = 3  # of each part: a proxy may take no more than 4 KiB of headers


class _Ranked(Struct, frozen=True):
    worker: str
    cached_tokens: int
    terms: dict[str, float]


class _Candidates(Struct, frozen=True):
    part: Part
    of: int
    best: list[_Ranked]


class _CachedTokens(Struct, frozen=True, omit_defaults=True):
    expected: int
    achievable: int
    achieved: int | None = None


class RouteSummary(Struct, frozen=True, kw_only=True):
    """The last attempt of a request. `terms` are seconds with policy `cost`."""

    request_id: str
    attempt: int
    policy: str
    kind: RouteKind
    prefill: str
    decode: str
    terms: dict[str, float]
    num_options: int
    decided_in_us: int
    prompt_tokens: int
    cached_tokens: _CachedTokens
    candidates: list[_Candidates]
    unit: Literal["s", ""] = "s"


def asks_why(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request wants to be explained."""
    return any(name == EXPLAIN_HEADER and value.strip() == b"1" for name, value in headers)


def summary_of(report: RouteReport) -> RouteSummary:
    """What fits a header."""
    last = report.attempts[-1]
    decision = last.decision
    return RouteSummary(
        request_id=report.request_id,
        attempt=last.attempt,
        policy=decision.policy,
        kind=decision.kind,
        prefill=decision.prefiller.worker_id,
        decode=decision.decode.worker_id,
        terms=_rounded(decision.terms),
        num_options=decision.num_options,
        decided_in_us=round(last.decided_in_s * 1e6),
        prompt_tokens=report.num_prompt_tokens,
        cached_tokens=_CachedTokens(
            decision.cached_tokens, report.achievable_cached_tokens, report.achieved_cached_tokens
        ),
        candidates=[_few(ranking) for ranking in decision.rankings],
        unit="s" if decision.policy == "cost" else "",
    )


class RouteHeaderLayer:
    """An ASGI layer that adds the header to the answers of requests that ask for it and were routed."""

    def __init__(self, app: ASGIApp, report_of: Callable[[str], RouteReport | None]) -> None:
        self._app = app
        self._report_of = report_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not asks_why(scope["headers"]):
            await self._app(scope, receive, send)
            return

        async def send_with_route(message: Message) -> None:
            if message["type"] == "http.response.start":
                report = self._report_of(scope["state"]["request_id"])
                if report is not None:
                    route = (ROUTE_HEADER, msgspec.json.encode(summary_of(report)))
                    message["headers"] = [*message["headers"], route]
            await send(message)

        await self._app(scope, receive, send_with_route)


def _few(ranking: Ranking) -> _Candidates:
    return _Candidates(
        ranking.part,
        ranking.num_workers,
        [
            _Ranked(ranked.worker.worker_id, ranked.cached_tokens, _rounded(ranked.terms))
            for ranked in ranking.best[:NUM_CANDIDATES]
        ],
    )


def _rounded(terms: dict[str, float]) -> dict[str, float]:
    return {name: round(number, 6) for name, number in terms.items()}

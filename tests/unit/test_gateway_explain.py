"""Why a request went where it did, as clients and operators may ask."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from litestar.types import ASGIApp

from phloem.services.gateway.app import create_app
from phloem.services.gateway.cluster.routing import Decision, route
from phloem.services.gateway.config import GatewayConfig
from phloem.services.gateway.gateway import Gateway
from phloem.services.gateway.route_report import RoutedAttempt, RouteReport
from tests.support.gateway import (
    REPLY,
    SECRET,
    FakeGenerator,
    encode,
    in_process,
    make_gateway,
    reply_script,
)
from tests.support.routing import request, worker

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
WHY = {"x-phloem-explain": "1"}


class ReportingGenerator(FakeGenerator):
    """Reports about every request that it ran."""

    def route_report(self, request_id: str) -> RouteReport | None:
        if not any(asked.request_id == request_id for asked in self.requests):
            return None
        attempt = RoutedAttempt(attempt=1, decision=decision(), decided_in_s=0.000_12)
        return RouteReport(
            request_id=request_id,
            num_prompt_tokens=1000,
            attempts=[attempt],
            achievable_cached_tokens=640,
            achieved_cached_tokens=576,
        )


def decision() -> Decision:
    workers = [worker(f"p{n}", "prefill", cached=64 * n) for n in range(11)]
    made = route("cost", request(num_explained=8), [*workers, worker("d", "decode")])
    assert made is not None
    return made


@pytest.fixture(scope="module")
def gateway(model_dir: Path) -> Gateway:
    return make_gateway(model_dir, ReportingGenerator(reply_script(encode(model_dir, REPLY))))


@pytest.fixture(scope="module")
def app(gateway: Gateway) -> ASGIApp:
    return create_app(gateway, SECRET, on_loopback=True)


@pytest.fixture
async def client(gateway: Gateway, app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    async with in_process(gateway, app) as client:
        yield client


def route_of(response: httpx.Response) -> dict[str, Any]:  # Any: JSON
    return dict(json.loads(response.headers["x-phloem-route"]))


@pytest.mark.parametrize("stream", [False, True])
async def test_header_tells_pair_terms_candidates_and_hits(client: httpx.AsyncClient, stream: bool) -> None:
    response = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream}, headers=WHY)
    assert response.status_code == 200
    told = route_of(response)
    assert told["request_id"] == response.headers["x-request-id"]
    assert (told["prefill"], told["decode"], told["kind"]) == ("p10", "d", "pair")
    assert told["terms"]["prefill"] == pytest.approx(0.36)
    assert told["cached_tokens"] == {"expected": 640, "achievable": 640, "achieved": 576}
    assert told["num_options"] == 12
    prefill, decode, both = told["candidates"]
    assert (prefill["part"], prefill["of"]) == ("prefill", 11)
    assert [ranked["worker"] for ranked in prefill["best"]] == ["p10", "p9", "p8"]
    assert (decode["of"], both["of"]) == (1, 1)
    assert both["best"][0]["terms"]["interference"] > 0
    assert len(response.headers["x-phloem-route"]) < 4096


@pytest.mark.parametrize("headers", [{}, {"x-phloem-explain": "0"}])
async def test_nobody_is_told_who_did_not_ask(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    response = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert response.status_code == 200 and "x-phloem-route" not in response.headers


async def test_the_body_is_the_same_with_and_without(client: httpx.AsyncClient) -> None:
    bodies = []
    for headers in ({}, WHY):
        body = (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).json()
        bodies.append({name: value for name, value in body.items() if name not in ("id", "created")})
    assert bodies[0] == bodies[1]


async def test_request_that_was_never_routed_has_no_route(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": 1}, headers=WHY)
    assert response.status_code == 400 and "x-phloem-route" not in response.headers


async def test_debug_route_tells_all_that_is_kept(client: httpx.AsyncClient) -> None:
    request_id = (await client.post("/v1/chat/completions", json=CHAT)).headers["x-request-id"]
    report = (await client.get(f"/debug/requests/{request_id}")).json()
    assert (report["request_id"], report["achieved_cached_tokens"]) == (request_id, 576)
    made = report["attempts"][0]["decision"]
    assert made["prefill"] == {"worker_id": "p10", "epoch": 1}
    assert [len(ranking["best"]) for ranking in made["rankings"]] == [8, 1, 1]


async def test_unknown_request_is_not_found(client: httpx.AsyncClient) -> None:
    response = await client.get("/debug/requests/req-unknown")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "request_not_found")


async def test_with_keys_only_the_admin_may_ask_why(model_dir: Path) -> None:
    generator = ReportingGenerator(reply_script(encode(model_dir, REPLY)))
    config = GatewayConfig(api_key=("alpha",), admin_api_key="root")
    async with in_process(make_gateway(model_dir, generator, config)) as client:
        for key, status in (("alpha", 403), ("root", 200)):
            headers = {"authorization": f"Bearer {key}"}
            chat = await client.post("/v1/chat/completions", json=CHAT, headers={**headers, **WHY})
            assert (chat.status_code, "x-phloem-route" in chat.headers) == (status, status == 200)
            request_id = generator.requests[-1].request_id if generator.requests else "req-1"
            assert (await client.get(f"/debug/requests/{request_id}", headers=headers)).status_code == status

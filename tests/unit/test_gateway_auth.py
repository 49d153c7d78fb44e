"""API keys: closed by default, decided on the route, and a cache of one's own for each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from litestar.types import ASGIApp

from phloem.services.gateway.app import create_app
from phloem.services.gateway.config import GatewayConfig
from phloem.services.gateway.gateway import Gateway
from phloem.services.gateway.tenant import Tenant, tenant_of_key
from tests.support.gateway import (
    END,
    SECRET,
    FakeGenerator,
    in_process,
    make_gateway,
    reply_script,
)

ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/generate"),
    ("GET", "/get_model_info"),
    ("POST", "/flush_cache"),
    ("GET", "/health_generate"),
    ("GET", "/metrics"),
    ("GET", "/debug/requests/req-1"),
    ("GET", "/schema"),
    ("GET", "/schema/openapi.json"),
]
ADMIN_ROUTES = [("POST", "/flush_cache")]
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def closed_gateway(model_dir: Path) -> Gateway:
    config = GatewayConfig(api_key=("alpha", "beta"), admin_api_key="root")
    return make_gateway(model_dir, FakeGenerator(reply_script([END])), config)


@pytest.fixture(scope="module")
def app(closed_gateway: Gateway) -> ASGIApp:
    return create_app(closed_gateway, SECRET, on_loopback=True)


@pytest.fixture
async def closed(
    closed_gateway: Gateway, app: ASGIApp, generator: FakeGenerator
) -> AsyncIterator[httpx.AsyncClient]:
    closed_gateway.generator = generator
    async with in_process(closed_gateway, app) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer(""),
        bearer("alph"),
        bearer("alphaa"),
        bearer("ALPHA"),
        {"authorization": "alpha"},
        {"authorization": "Basic alpha"},
        {"host": "/health", "authorization": "Bearer"},
    ],
)
async def test_every_route_but_health_asks_for_a_key(
    closed: httpx.AsyncClient, method: str, path: str, headers: dict[str, str]
) -> None:
    response = await closed.request(method, path, headers=headers)
    assert response.status_code in (400, 401)  # 400: not a host name at all
    assert response.status_code == 401 or "host" in headers
    assert response.json()["error"]["code"] in ("invalid_api_key", "bad_request")


async def test_health_needs_no_key(closed: httpx.AsyncClient) -> None:
    assert (await closed.get("/health")).status_code == 200


@pytest.mark.parametrize("path", ["/health/../v1/models", "/health/%2e%2e/metrics", "//metrics", "/metrics/"])
async def test_no_spelling_of_a_path_gets_around_the_key(closed: httpx.AsyncClient, path: str) -> None:
    response = await closed.get(path)
    assert response.status_code in (401, 404)


async def test_unauthorized_has_openais_shape(closed: httpx.AsyncClient) -> None:
    response = await closed.get("/v1/models")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("key", ["alpha", "beta", "root"])
async def test_each_key_opens(closed: httpx.AsyncClient, key: str) -> None:
    assert (await closed.get("/v1/models", headers=bearer(key))).status_code == 200


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
async def test_admin_routes_take_only_the_admin_key(
    closed: httpx.AsyncClient, generator: FakeGenerator, method: str, path: str
) -> None:
    refused = await closed.request(method, path, headers=bearer("alpha"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_key_required")
    assert generator.num_flushes == 0
    assert (await closed.request(method, path, headers=bearer("root"))).status_code == 200
    assert generator.num_flushes == 1


async def test_admin_routes_are_shut_when_there_are_keys_but_no_admin_key(
    model_dir: Path, generator: FakeGenerator
) -> None:
    gateway = make_gateway(model_dir, generator, GatewayConfig(api_key=("alpha",)))
    async with in_process(gateway, headers=bearer("alpha")) as client:
        assert (await client.post("/flush_cache")).status_code == 403


async def test_an_admin_key_alone_closes_only_admin_routes(model_dir: Path, generator: FakeGenerator) -> None:
    gateway = make_gateway(model_dir, generator, GatewayConfig(admin_api_key="root"))
    async with in_process(gateway) as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.post("/flush_cache")).status_code == 401
        assert (await client.post("/flush_cache", headers=bearer("root"))).status_code == 200


async def test_beyond_loopback_admin_routes_need_the_admin_key(
    model_dir: Path, generator: FakeGenerator
) -> None:
    shut = make_gateway(model_dir, generator, GatewayConfig(allow_anonymous=True))
    async with in_process(shut, create_app(shut, SECRET, on_loopback=False)) as client:
        assert (await client.get("/v1/models")).status_code == 200
        refused = await client.post("/flush_cache")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_key_required")
        guessed = await client.post("/flush_cache", headers=bearer("root"))
        assert guessed.status_code == 403
    closed = make_gateway(model_dir, generator, GatewayConfig(allow_anonymous=True, admin_api_key="root"))
    async with in_process(closed, create_app(closed, SECRET, on_loopback=False)) as client:
        assert (await client.post("/flush_cache")).status_code == 401
        assert (await client.post("/flush_cache", headers=bearer("root"))).status_code == 200


async def test_on_loopback_a_gateway_without_keys_flushes_for_anybody(
    model_dir: Path, generator: FakeGenerator
) -> None:
    gateway = make_gateway(model_dir, generator)
    async with in_process(gateway) as client:
        assert (await client.post("/flush_cache")).status_code == 200
        assert (await client.get("/flush_cache")).status_code == 405  # what a link on a web page could send


OWN_PAGES = ["http://localhost:3000", "http://127.0.0.1", "http://[::1]:8080", "https://ui.localhost"]
FOREIGN_PAGES = [
    "https://evil.example",
    "http://localhost.evil.example",
    "http://127.0.0.1.evil.example:30000",
    "http://10.0.0.5",
    "http://[::1",
    "null",
    "",
]


@pytest.mark.parametrize("origin", FOREIGN_PAGES)
async def test_foreign_web_pages_have_no_use_of_a_gateway_without_keys(
    model_dir: Path, generator: FakeGenerator, origin: str
) -> None:
    gateway = make_gateway(model_dir, generator)
    async with in_process(gateway, headers={"origin": origin}) as client:
        simple = {"content-type": "text/plain"}  # what a browser sends without asking first
        for path in ("/v1/chat/completions", "/generate", "/flush_cache"):
            refused = await client.post(path, content=b'{"text": "x"}', headers=simple)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "foreign_origin")
        assert (await client.get("/health")).status_code == 200
    assert not generator.requests
    assert generator.num_flushes == 0


@pytest.mark.parametrize("host", ["evil.example", "evil.example:30000", "127.0.0.1.evil.example", "[::"])
async def test_names_that_came_to_mean_this_machine_are_no_way_in(
    model_dir: Path, generator: FakeGenerator, host: str
) -> None:
    async with in_process(make_gateway(model_dir, generator), headers={"host": host}) as client:
        for path in ("/v1/models", "/metrics", "/debug/requests/x"):
            refused = await client.get(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "foreign_origin")
            assert "Host header" in refused.json()["error"]["message"]
        assert (await client.get("/health")).status_code == 200
    anybody = make_gateway(model_dir, generator, GatewayConfig(allow_anonymous=True))
    async with in_process(anybody, headers={"host": host}) as client:
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize("host", ["localhost:30000", "127.0.0.1:30000", "[::1]:30000", "phloem.localhost"])
async def test_names_of_this_machine_are_let_in(model_dir: Path, generator: FakeGenerator, host: str) -> None:
    async with in_process(make_gateway(model_dir, generator), headers={"host": host}) as client:
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize("origin", OWN_PAGES)
async def test_pages_of_this_machine_use_it(model_dir: Path, generator: FakeGenerator, origin: str) -> None:
    gateway = make_gateway(model_dir, generator)
    async with in_process(gateway, headers={"origin": origin}) as client:
        assert (await client.post("/v1/chat/completions", json={"messages": USER})).status_code == 200
        assert (await client.post("/flush_cache")).status_code == 200


async def test_pages_come_in_with_a_key_or_when_all_may(
    closed: httpx.AsyncClient, model_dir: Path, generator: FakeGenerator
) -> None:
    page = {"origin": FOREIGN_PAGES[0]}
    assert (await closed.get("/v1/models", headers=page | bearer("alpha"))).status_code == 200
    assert (await closed.post("/flush_cache", headers=page | bearer("root"))).status_code == 200
    anybody = make_gateway(model_dir, generator, GatewayConfig(allow_anonymous=True))
    async with in_process(anybody, headers=page) as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.post("/flush_cache")).status_code == 403
        explained = await client.get("/v1/models", headers={"x-phloem-explain": "1"})
        assert explained.status_code == 403


async def test_each_key_has_a_cache_of_its_own(closed: httpx.AsyncClient, generator: FakeGenerator) -> None:
    for key, salt in (("alpha", None), ("beta", None), ("alpha", "mine"), ("beta", "mine"), ("alpha", None)):
        body = {"messages": USER, "cache_salt": salt}
        response = await closed.post("/v1/chat/completions", json=body, headers=bearer(key))
        assert response.status_code == 200
    salts = [request.cache_salt for request in generator.requests]
    assert len(set(salts)) == 4
    assert salts[0] == salts[4]
    assert all("alpha" not in salt and "beta" not in salt for salt in salts)


def test_a_tenant_can_not_reach_anothers_cache() -> None:
    alpha, beta = tenant_of_key("alpha", b"s"), tenant_of_key("beta", b"s")
    assert alpha.cache_salt(beta.cache_salt(None)) != beta.cache_salt(None)
    assert tenant_of_key("alpha", b"s") == alpha
    assert tenant_of_key("alpha", b"other cluster") != alpha
    assert Tenant().cache_salt("x") == "x"
    assert Tenant().cache_salt(None) == ""

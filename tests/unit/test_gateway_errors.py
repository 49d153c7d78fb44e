"""Requests that can't be answered: bad bodies and routes, limits, the cluster's refusals."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from phloem.services.gateway.config import GatewayConfig
from phloem.services.gateway.generation import GeneratedTokens
from phloem.shared.errors import invalid_request, overloaded
from tests.support.gateway import MODEL, FakeGenerator, in_process, make_gateway, make_model_dir
from tests.support.gateway_errors import CHAT, COMPLETE, INVALID, USER, error_of


@pytest.fixture
def client(bounded_client: httpx.AsyncClient) -> httpx.AsyncClient:
    return bounded_client


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"messages": [',
        b'{"messages": NaN}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": []} x',
        b'{"x": ' + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"messages": [], "tools": ' + b'{"a":' * 1000 + b"1" + b"}" * 1001,
    ],
)
async def test_invalid_json_is_a_400(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post(CHAT, content=body)
    assert error_of(response) == (400, INVALID, None, "invalid_json")


async def test_an_empty_body_is_called_empty(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT)
    assert response.json()["error"]["message"] == "the body is empty: it has to be a JSON object"


@pytest.mark.parametrize("body", [b"[]", b"3", b"null", b'"x"'])
async def test_a_body_that_is_no_object_is_a_400(client: httpx.AsyncClient, body: bytes) -> None:
    assert error_of(await client.post(CHAT, content=body)) == (400, INVALID, None, "invalid_type")


async def test_number_out_of_range_is_a_400(client: httpx.AsyncClient) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}'
    assert error_of(await client.post(CHAT, content=body)) == (400, INVALID, "temperature", "invalid_value")


async def test_missing_messages_is_named(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json={"model": MODEL})
    assert error_of(response) == (400, INVALID, "messages", "missing_required_parameter")


async def test_body_over_the_limit_is_a_413_with_and_without_its_length(client: httpx.AsyncClient) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1024
            yield b" " * 1024

    declared = await client.post(CHAT, content=b" " * 20_000)
    assert error_of(declared) == (413, INVALID, None, "body_too_large")
    chunked = await client.post(CHAT, content=chunks())
    assert error_of(chunked) == (413, INVALID, None, "body_too_large")
    assert sent < 20 * 1024


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/v1/models/org/other", 404, "model_not_found"),
    ],
)
async def test_wrong_routes_have_the_same_shape(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await client.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.json()["error"]["type"] == INVALID
    assert response.headers["x-request-id"].startswith("req-")


async def test_template_that_refuses_the_messages_is_a_400_with_its_words(
    tmp_path: Path, generator: FakeGenerator
) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    gateway = make_gateway(make_model_dir(tmp_path, chat_template=template), generator)
    async with in_process(gateway) as client:
        response = await client.post(CHAT, json={"messages": USER})
    assert error_of(response) == (400, INVALID, "messages", "chat_template_error")
    assert response.json()["error"]["message"] == "roles must alternate"


async def test_missing_template_is_a_400(tmp_path: Path, generator: FakeGenerator) -> None:
    gateway = make_gateway(make_model_dir(tmp_path, chat_template=None), generator)
    async with in_process(gateway) as client:
        response = await client.post(CHAT, json={"messages": USER})
        assert error_of(response) == (400, INVALID, "messages", "chat_template_missing")
        assert (await client.post(COMPLETE, json={"prompt": "x"})).status_code == 200


async def test_errors_of_the_cluster_keep_status_and_retry_advice(
    client: httpx.AsyncClient, generator: FakeGenerator
) -> None:
    generator.script = lambda request: [overloaded("all queues are full", retry_after_s=2.2)]
    for stream in (False, True):
        response = await client.post(CHAT, json={"messages": USER, "stream": stream})
        assert error_of(response) == (503, "server_error", None, "overloaded")
        assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": USER, "response_format": {"type": "json_object"}}, "response_format"),
        (COMPLETE, {"prompt": "x", "json_schema": {"type": "nonsense"}}, "json_schema"),
        ("/generate", {"text": "x", "sampling_params": {"regex": "(((", "n": 2}}, "sampling_params.regex"),
    ],
)
async def test_a_grammar_that_a_worker_refuses_is_named_by_its_field(
    client: httpx.AsyncClient, generator: FakeGenerator, path: str, body: dict[str, Any], param: str
) -> None:
    refusal = invalid_request("the grammar can't be used: it is nonsense", code="bad_grammar")
    generator.script = lambda request: [refusal]
    for stream in (False, True):
        response = await client.post(path, json=body | {"stream": stream})
        assert error_of(response) == (400, INVALID, param, "bad_grammar")


async def test_an_error_about_something_else_names_no_grammar(
    client: httpx.AsyncClient, generator: FakeGenerator
) -> None:
    generator.script = lambda request: [overloaded("all queues are full")]
    response = await client.post(CHAT, json={"messages": USER, "regex": "a"})
    assert error_of(response) == (503, "server_error", None, "overloaded")


async def test_a_bug_shows_nothing_of_itself(
    client: httpx.AsyncClient, generator: FakeGenerator, caplog: pytest.LogCaptureFixture
) -> None:
    generator.script = lambda request: [RuntimeError("secret detail")]
    response = await client.post(CHAT, json={"messages": USER})
    assert error_of(response) == (500, "server_error", None, "internal_error")
    assert "secret detail" not in response.text
    assert "secret detail" in caplog.text


async def test_a_generation_without_an_end_is_an_error(
    client: httpx.AsyncClient, generator: FakeGenerator
) -> None:
    generator.script = lambda request: [GeneratedTokens([50])]
    response = await client.post(CHAT, json={"messages": USER})
    assert error_of(response) == (500, "server_error", None, "generation_incomplete")


async def test_too_many_sequences_are_refused_and_room_is_given_back(
    model_dir: Path, generator: FakeGenerator
) -> None:
    gateway = make_gateway(model_dir, generator, GatewayConfig(max_inflight_requests=3))
    async with in_process(gateway) as client:
        never = await client.post(CHAT, json={"messages": USER, "n": 4})
        assert error_of(never) == (400, INVALID, "n", "too_many_sequences")
        with gateway.admission.admit("", 2):
            full = await client.post(CHAT, json={"messages": USER, "n": 2})
            assert error_of(full) == (503, "server_error", None, "overloaded")
            assert full.headers["retry-after"] == "1"
            assert (await client.post(CHAT, json={"messages": USER})).status_code == 200
        assert (await client.post(CHAT, json={"messages": USER, "n": 3})).status_code == 200
    assert gateway.admission.num_inflight == 0


async def test_one_key_can_be_held_to_less(model_dir: Path, generator: FakeGenerator) -> None:
    config = GatewayConfig(max_inflight_per_key=2, api_key=("key",))
    gateway = make_gateway(model_dir, generator, config)
    async with in_process(gateway, headers={"authorization": "Bearer key"}) as client:
        assert (await client.post(CHAT, json={"messages": USER, "n": 2})).status_code == 200
        [tenant] = {request.cache_salt[:12] for request in generator.requests}
        with gateway.admission.admit(tenant, 1), gateway.admission.admit("another", 2):
            response = await client.post(CHAT, json={"messages": USER, "n": 2})
            assert error_of(response) == (429, "rate_limit_error", None, "rate_limit_exceeded")
            assert response.headers["retry-after"] == "1"

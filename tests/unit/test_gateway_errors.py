"""Bad input: its status, and OpenAI's error type, param and code; nothing of it reaches the cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from litestar.types import ASGIApp

from phloem.services.gateway.app import create_app
from phloem.services.gateway.config import GatewayConfig
from phloem.services.gateway.gateway import Gateway
from phloem.services.gateway.generation import GeneratedTokens
from phloem.shared.errors import overloaded
from tests.support.gateway import (
    CONTEXT_LENGTH,
    END,
    MODEL,
    SECRET,
    FakeGenerator,
    in_process,
    make_gateway,
    make_model_dir,
    reply_script,
)

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def gateway(model_dir: Path) -> Gateway:
    config = GatewayConfig(max_body_bytes=16_384, max_messages=8, max_batch_prompts=4, max_n=4)
    return make_gateway(model_dir, FakeGenerator(reply_script([END])), config)


@pytest.fixture(scope="module")
def app(gateway: Gateway) -> ASGIApp:
    return create_app(gateway, SECRET, on_loopback=True)


@pytest.fixture
async def client(
    gateway: Gateway, app: ASGIApp, generator: FakeGenerator
) -> AsyncIterator[httpx.AsyncClient]:
    gateway.generator = generator
    async with in_process(gateway, app) as client:
        yield client


def error_of(response: httpx.Response) -> tuple[int, str, str | None, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return response.status_code, error["type"], error["param"], error["code"]


INVALID = "invalid_request_error"
WRONG_CHAT: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"messages": 3}, 400, "messages", "invalid_type"),
    ({"messages": []}, 400, "messages", "empty_array"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content", "invalid_type"),
    ({"messages": [{"content": "x"}]}, 400, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
    ({"messages": USER * 9}, 400, "messages", "invalid_value"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content[0].type",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        400,
        "messages[0].content[0].text",
        "missing_required_parameter",
    ),
    (
        {"messages": [*USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}]},
        400,
        "messages[1].tool_calls",
        "unsupported_parameter",
    ),
    ({"model": "gpt-17"}, 404, "model", "model_not_found"),
    ({"model": 3}, 400, "model", "invalid_type"),
    ({"max_tokens": CONTEXT_LENGTH}, 400, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "x" * 1000}]}, 400, "messages", "context_length_exceeded"),
    ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": -5}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": 10**30}, 400, "messages", "context_length_exceeded"),
    ({"max_tokens": "7"}, 400, "max_tokens", "invalid_type"),
    ({"max_tokens": 1.5}, 400, "max_tokens", "invalid_type"),
    ({"max_tokens": 1, "max_completion_tokens": 0}, 400, "max_completion_tokens", "invalid_value"),
    ({"temperature": -0.1}, 400, "temperature", "invalid_value"),
    ({"temperature": 2.1}, 400, "temperature", "invalid_value"),
    ({"temperature": "hot"}, 400, "temperature", "invalid_type"),
    ({"top_p": 0}, 400, "top_p", "invalid_value"),
    ({"top_p": 1.01}, 400, "top_p", "invalid_value"),
    ({"top_k": -2}, 400, "top_k", "invalid_value"),
    ({"top_k": 10**12}, 400, "top_k", "invalid_value"),
    ({"min_p": -1}, 400, "min_p", "invalid_value"),
    ({"min_p": 2}, 400, "min_p", "invalid_value"),
    ({"seed": 1 << 63}, 400, "seed", "invalid_value"),
    ({"seed": 10**40}, 400, "seed", "invalid_value"),
    ({"seed": 1.5}, 400, "seed", "invalid_type"),
    ({"n": 0}, 400, "n", "invalid_value"),
    ({"n": 5}, 400, "n", "invalid_value"),
    ({"stop": ["a"] * 17}, 400, "stop", "invalid_value"),
    ({"stop": "a" * 513}, 400, "stop", "invalid_value"),
    ({"stop": ["b", "a" * 513]}, 400, "stop[1]", "invalid_value"),
    ({"stop": [3]}, 400, "stop[0]", "invalid_type"),
    ({"stop_token_ids": [400]}, 400, "stop_token_ids[0]", "token_out_of_range"),
    ({"stop_token_ids": [0] * 129}, 400, "stop_token_ids", "invalid_value"),
    ({"stream": "yes"}, 400, "stream", "invalid_type"),
    ({"cache_salt": "x" * 257}, 400, "cache_salt", "invalid_value"),
    ({"stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage", "invalid_type"),
    (
        {"chat_template_kwargs": {"messages": "x"}},
        400,
        "chat_template_kwargs.messages",
        "unsupported_parameter",
    ),
    (
        {"chat_template_kwargs": {"thinking": "x" * 257}},
        400,
        "chat_template_kwargs.thinking",
        "invalid_value",
    ),
]
UNSUPPORTED_CHAT: list[dict[str, Any]] = [
    {"tools": [{"type": "function"}]},
    {"tool_choice": "required"},
    {"tool_choice": {"type": "function"}},
    {"functions": [{}]},
    {"function_call": {"name": "f"}},
    {"logprobs": True},
    {"top_logprobs": 2},
    {"logit_bias": {"1": 100}},
    {"frequency_penalty": 0.5},
    {"presence_penalty": -1},
    {"repetition_penalty": 1.1},
    {"modalities": ["text", "audio"]},
    {"audio": {"voice": "x"}},
    {"guided_json": {"type": "object"}},
    {"structural_tag": "{}"},
    {"min_tokens": 4},
    {"continue_final_message": True},
]
UNSUPPORTED_COMPLETION: list[dict[str, Any]] = [
    {"best_of": 2},
    {"suffix": "x"},
    {"echo": True},
    {"logprobs": 0},
    {"logit_bias": {"1": 100}},
    {"presence_penalty": 1},
]
HARMLESS: dict[str, Any] = {
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "logprobs": False,
    "top_logprobs": None,
    "logit_bias": {},
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "modalities": ["text"],
    "n": 1,
    "user": "somebody",
    "store": False,
    "metadata": {"a": {"b": []}},
    "no_such_field": [1, {"x": None}],
}


@pytest.mark.parametrize(("wrong", "status", "param", "code"), WRONG_CHAT)
async def test_wrong_chat_field_is_named(
    client: httpx.AsyncClient,
    generator: FakeGenerator,
    wrong: dict[str, Any],
    status: int,
    param: str | None,
    code: str,
) -> None:
    for stream in (False, True):
        body = {"model": MODEL, "messages": USER, "stream": stream} | wrong
        response = await client.post(CHAT, json=body)
        assert error_of(response) == (status, INVALID, param, code)
    assert generator.requests == []


@pytest.mark.parametrize("wrong", UNSUPPORTED_CHAT)
async def test_chat_field_that_would_be_lost_is_refused(
    client: httpx.AsyncClient, generator: FakeGenerator, wrong: dict[str, Any]
) -> None:
    response = await client.post(CHAT, json={"model": MODEL, "messages": USER} | wrong)
    assert error_of(response) == (400, INVALID, next(iter(wrong)), "unsupported_parameter")
    assert generator.requests == []


@pytest.mark.parametrize("wrong", UNSUPPORTED_COMPLETION)
async def test_completion_field_that_would_be_lost_is_refused(
    client: httpx.AsyncClient, wrong: dict[str, Any]
) -> None:
    response = await client.post(COMPLETE, json={"model": MODEL, "prompt": "x"} | wrong)
    assert error_of(response) == (400, INVALID, next(iter(wrong)), "unsupported_parameter")


async def test_unknown_and_harmless_fields_are_accepted(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json={"model": MODEL, "messages": USER} | HARMLESS)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("prompt", "param", "code"),
    [
        ("", "prompt", "empty_prompt"),
        ([], "prompt", "empty_prompt"),
        ([[]], "prompt", "empty_prompt"),
        (["a", ""], "prompt[1]", "empty_prompt"),
        (["a", 3], "prompt", "invalid_type"),
        ([3, [4]], "prompt", "invalid_type"),
        ({"text": "a"}, "prompt", "invalid_type"),
        ([1.5], "prompt[0]", "invalid_type"),
        ([5, 400], "prompt[1]", "token_out_of_range"),
        ([-1], "prompt[0]", "token_out_of_range"),
        ([[5], [5, 10**12]], "prompt[1][1]", "token_out_of_range"),
        ([5] * CONTEXT_LENGTH, "prompt", "context_length_exceeded"),
        (["a", "x" * 300], "prompt[1]", "context_length_exceeded"),
        (["a"] * 5, "prompt", "invalid_value"),
        (None, "prompt", "invalid_type"),
    ],
)
async def test_wrong_prompt_is_named(
    client: httpx.AsyncClient, generator: FakeGenerator, prompt: object, param: str, code: str
) -> None:
    response = await client.post(COMPLETE, json={"model": MODEL, "prompt": prompt})
    assert error_of(response) == (400, INVALID, param, code)
    assert generator.requests == []


async def test_context_error_tells_the_numbers(client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETE, json={"model": MODEL, "prompt": [5] * 200, "max_tokens": 57})
    message = response.json()["error"]["message"]
    assert "256" in message
    assert "200" in message
    assert "57" in message
    fits = await client.post(COMPLETE, json={"model": MODEL, "prompt": [5] * 200, "max_tokens": 56})
    assert fits.status_code == 200


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


@pytest.mark.parametrize(
    ("wrong", "param", "code"),
    [
        ({}, "text", "missing_required_parameter"),
        ({"text": "a", "input_ids": [3]}, "text", "missing_required_parameter"),
        ({"text": ""}, "text", "empty_prompt"),
        ({"input_ids": [400]}, "input_ids[0]", "token_out_of_range"),
        ({"text": "a", "sampling_params": 3}, "sampling_params", "invalid_type"),
        ({"text": "a", "sampling_params": [{}]}, "sampling_params", "invalid_type"),
        ({"text": "a", "sampling_params": {"top_p": 7}}, "sampling_params.top_p", "invalid_value"),
        ({"text": "a", "sampling_params": {"top_p": "x"}}, "sampling_params.top_p", "invalid_type"),
        (
            {"text": "a", "sampling_params": {"max_new_tokens": 0}},
            "sampling_params.max_new_tokens",
            "invalid_value",
        ),
        (
            {"text": "a", "sampling_params": {"json_schema": "{"}},
            "sampling_params.json_schema",
            "invalid_value",
        ),
        ({"text": "a", "return_logprob": True}, "return_logprob", "unsupported_parameter"),
        ({"text": "a", "image_data": "http://x"}, "image_data", "unsupported_parameter"),
    ],
)
async def test_wrong_native_field_is_named(
    client: httpx.AsyncClient, generator: FakeGenerator, wrong: dict[str, Any], param: str, code: str
) -> None:
    response = await client.post("/generate", json=wrong)
    assert error_of(response) == (400, INVALID, param, code)
    assert generator.requests == []


async def test_errors_of_the_cluster_keep_status_and_retry_advice(
    client: httpx.AsyncClient, generator: FakeGenerator
) -> None:
    generator.script = lambda request: [overloaded("all queues are full", retry_after_s=2.2)]
    for stream in (False, True):
        response = await client.post(CHAT, json={"messages": USER, "stream": stream})
        assert error_of(response) == (503, "server_error", None, "overloaded")
        assert response.headers["retry-after"] == "3"


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

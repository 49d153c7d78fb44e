"""Wrong fields of a request's body: each error has its status and names the field; nothing of it reaches the
cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from phloem.services.gateway.api.refusals import (
    CHAT_REFUSALS,
    COMPLETION_REFUSALS,
    NATIVE_REFUSALS,
    NATIVE_SAMPLING_REFUSALS,
)
from tests.support.gateway import CONTEXT_LENGTH, MODEL, FakeGenerator
from tests.support.gateway_errors import CHAT, COMPLETE, INVALID, USER, error_of


@pytest.fixture
def client(bounded_client: httpx.AsyncClient) -> httpx.AsyncClient:
    return bounded_client


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
    {"guided_json": {}},
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


def test_every_refused_field_stands_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text()
    taken = {"spaces_between_special_tokens", "stream_interval"}  # whatever their value
    refused = {*CHAT_REFUSALS, *COMPLETION_REFUSALS, *NATIVE_REFUSALS, *NATIVE_SAMPLING_REFUSALS} - taken
    assert [name for name in sorted(refused) if f"`{name}`" not in page] == []


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


@pytest.mark.parametrize(
    ("wrong", "allowed"),
    [
        ({"response_format": {"type": "xml"}}, "json_object, json_schema, text"),
        (
            {"messages": [{"role": "wizard", "content": "x"}]},
            "assistant, developer, system, tool, user",
        ),
    ],
)
async def test_a_value_that_is_none_of_a_few_is_answered_with_those(
    client: httpx.AsyncClient, wrong: dict[str, Any], allowed: str
) -> None:
    response = await client.post(CHAT, json={"messages": USER} | wrong)
    assert response.json()["error"]["message"].endswith(f": it must be one of {allowed}")


async def test_context_error_tells_the_numbers(client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETE, json={"model": MODEL, "prompt": [5] * 200, "max_tokens": 57})
    message = response.json()["error"]["message"]
    assert "256" in message
    assert "200" in message
    assert "57" in message
    fits = await client.post(COMPLETE, json={"model": MODEL, "prompt": [5] * 200, "max_tokens": 56})
    assert fits.status_code == 200


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
        (
            {"text": "a", "sampling_params": {"max_new_toks": 5}},
            "sampling_params.max_new_toks",
            "unknown_parameter",
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


async def test_a_misspelt_sampling_parameter_is_told_its_name(client: httpx.AsyncClient) -> None:
    response = await client.post("/generate", json={"text": "a", "sampling_params": {"max_new_toks": 5}})
    assert response.json()["error"]["message"].endswith("did you mean max_new_tokens?")


async def test_sampling_parameters_of_sglang_that_change_nothing_here_are_accepted(
    client: httpx.AsyncClient,
) -> None:
    harmless = {"spaces_between_special_tokens": True, "stream_interval": 2, "frequency_penalty": 0}
    response = await client.post("/generate", json={"text": "a", "sampling_params": harmless})
    assert response.status_code == 200

"""Answers, whole and streamed, as the official client reads them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
from tokenizers import Tokenizer

from phloem.services.gateway.config import GatewayConfig
from phloem.services.gateway.generation import GeneratedTokens
from phloem.services.gateway.sampling import derived_seed
from phloem.shared.errors import unavailable
from tests.support.gateway import (
    CONTEXT_LENGTH,
    END,
    MODEL,
    REPLY,
    FakeGenerator,
    encode,
    events_of,
    in_process,
    make_gateway,
    over_http,
    reply_script,
)

PROMPT = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
async def client(model_dir: Path, generator: FakeGenerator) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        over_http(make_gateway(model_dir, generator)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        yield client


def decode(model_dir: Path, ids: list[int]) -> str:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json")).decode(ids)


async def test_chat_through_the_official_client(
    client: openai.AsyncOpenAI, generator: FakeGenerator, model_dir: Path
) -> None:
    generator.script = lambda request: [
        GeneratedTokens(encode(model_dir, REPLY)[:5], num_cached_tokens=4),
        GeneratedTokens([*encode(model_dir, REPLY)[5:], END], finish_reason="stop"),
    ]
    answer = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    )
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint is not None
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", REPLY)
    assert answer.choices[0].finish_reason == "stop"
    prompt, generated = len(encode(model_dir, PROMPT)), len(encode(model_dir, REPLY)) + 1
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == prompt
    assert answer.usage.completion_tokens == generated
    assert answer.usage.total_tokens == prompt + generated
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    [request] = generator.requests
    assert request.token_ids == encode(model_dir, PROMPT)
    assert request.sampling.max_tokens == CONTEXT_LENGTH - prompt
    assert request.sampling.temperature == 1.0


async def test_chat_streams_role_text_reason_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hello"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    first, *middle, last = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == REPLY
    reasons = [chunk.choices[0].finish_reason for chunk in middle]
    assert reasons == [None] * (len(middle) - 1) + ["stop"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_completion_through_the_official_client(
    client: openai.AsyncOpenAI, generator: FakeGenerator, model_dir: Path
) -> None:
    answer = await client.completions.create(model=MODEL, prompt="hello", max_tokens=3, temperature=0)
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert generator.requests[0].sampling.temperature == 0.0
    stream = await client.completions.create(model=MODEL, prompt=encode(model_dir, "hello"), stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == REPLY
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert generator.requests[1].token_ids == generator.requests[0].token_ids


async def test_models_and_errors_through_the_official_client(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).owned_by == "phloem"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-17", messages=[{"role": "user", "content": "x"}])
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.completions.create(model=MODEL, prompt="x", temperature=7)
    assert wrong.value.param == "temperature"


async def test_error_inside_a_stream_is_its_last_event(
    client: openai.AsyncOpenAI, raw: httpx.AsyncClient, generator: FakeGenerator
) -> None:
    generator.script = lambda request: [GeneratedTokens([50]), unavailable("the worker died", code="lost")]
    stream = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], stream=True
    )
    with pytest.raises(openai.APIError, match="the worker died"):
        [chunk async for chunk in stream]
    response = await raw.post("/v1/completions", json={"prompt": "x", "stream": True})
    last = json.loads(events_of(response.text)[-1])
    assert (last["error"]["code"], last["error"]["type"]) == ("lost", "server_error")


async def test_choices_have_seeds_of_their_own_and_run_at_once(
    raw: httpx.AsyncClient, generator: FakeGenerator
) -> None:
    body = {"prompt": ["a", "b"], "n": 3, "seed": -7, "max_tokens": 2, "stream": True}
    response = await raw.post("/v1/completions", json=body)
    events = events_of(response.text)
    assert events[-1] == "[DONE]"
    seen = {choice["index"] for event in events[:-1] for choice in json.loads(event)["choices"]}
    assert seen == set(range(6))
    assert len({request.request_id for request in generator.requests}) == 6
    seeds = [request.sampling.seed for request in generator.requests]
    assert seeds == [-7, derived_seed(-7, 1), derived_seed(-7, 2)] * 2
    assert len(set(seeds)) == 3


async def test_usage_of_many_choices_counts_each_prompt_once(
    raw: httpx.AsyncClient, generator: FakeGenerator
) -> None:
    generator.script = lambda request: [GeneratedTokens([50, 51], "length", num_cached_tokens=1)]
    body = {"prompt": [[5, 6, 7], [8, 9]], "n": 2, "max_tokens": 2}
    answer = (await raw.post("/v1/completions", json=body)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 8,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_one_failing_choice_stops_the_others(raw: httpx.AsyncClient, generator: FakeGenerator) -> None:
    plain = generator.script

    def script(request: object) -> list[GeneratedTokens | BaseException]:
        if len(generator.requests) == 2:
            return [unavailable("gone")]
        return list(plain(generator.requests[-1]))

    generator.script = script
    response = await raw.post("/v1/completions", json={"prompt": "a", "n": 3})
    assert response.status_code == 503
    assert generator.num_running == 0


@pytest.mark.parametrize("per_item", [1, 3, 100])
@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_cuts_text_counts_and_aborts(
    raw: httpx.AsyncClient, generator: FakeGenerator, model_dir: Path, per_item: int, stream: bool
) -> None:
    ids = encode(model_dir, REPLY)
    generator.script = reply_script(ids, per_item=per_item)
    body = {"prompt": "x", "stop": ["is th", "nowhere"], "stream": stream}
    body["stream_options"] = {"include_usage": True}
    response = await raw.post("/v1/completions", json=body)
    before = REPLY[: REPLY.index("is th")]
    if stream:
        answers = [json.loads(event) for event in events_of(response.text)[:-1]]
        text = "".join(choice["text"] for answer in answers for choice in answer["choices"])
        reason, usage = answers[-2]["choices"][0]["finish_reason"], answers[-1]["usage"]
    else:
        answer = response.json()
        text, reason = answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
        usage = answer["usage"]
    assert (text, reason) == (before, "stop")
    texts = [decode(model_dir, ids[:count]) for count in range(len(ids) + 1)]
    assert usage["completion_tokens"] == next(n for n, text in enumerate(texts) if "is th" in text)
    if per_item == 1:
        assert generator.closed == [generator.requests[0].request_id]


async def test_a_stop_token_is_counted_but_not_shown(
    raw: httpx.AsyncClient, generator: FakeGenerator, model_dir: Path
) -> None:
    ids = encode(model_dir, "Hello")
    generator.script = lambda request: [GeneratedTokens(ids, finish_reason="stop")]
    body = {"prompt": "x", "stop_token_ids": [ids[-1]], "ignore_eos": True}
    answer = (await raw.post("/v1/completions", json=body)).json()
    assert "Hello".startswith(answer["choices"][0]["text"])
    assert answer["choices"][0]["text"] != "Hello"
    assert answer["usage"]["completion_tokens"] == len(ids)
    sampling = generator.requests[0].sampling
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((ids[-1],), True)


async def test_tokens_that_came_together_are_one_event(
    raw: httpx.AsyncClient, generator: FakeGenerator, model_dir: Path
) -> None:
    generator.script = reply_script(encode(model_dir, REPLY), per_item=1000)
    response = await raw.post("/v1/completions", json={"prompt": "x", "stream": True})
    [event, done] = events_of(response.text)
    assert json.loads(event)["choices"][0]["text"] == REPLY
    assert done == "[DONE]"


async def test_sampling_fields_reach_the_cluster(raw: httpx.AsyncClient, generator: FakeGenerator) -> None:
    body = {
        "messages": [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "x"}],
        "max_completion_tokens": 5,
        "max_tokens": 6,
        "temperature": 1e-9,
        "top_p": 0.5,
        "top_k": 40,
        "min_p": 0.1,
        "seed": (1 << 63) - 1,
        "cache_salt": "s",
    }
    assert (await raw.post("/v1/chat/completions", json=body)).status_code == 200
    [request] = generator.requests
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (5, 0.0, 0.5)
    assert (sampling.top_k, sampling.min_p, sampling.seed) == (40, 0.1, (1 << 63) - 1)
    assert request.cache_salt == "s"


async def test_seeds_differ_when_none_is_given(raw: httpx.AsyncClient, generator: FakeGenerator) -> None:
    for _ in range(2):
        await raw.post("/v1/completions", json={"prompt": "x", "top_k": -1})
    first, second = (request.sampling for request in generator.requests)
    assert first.seed != second.seed
    assert first.top_k == 0


async def test_default_max_tokens_never_asks_for_more_than_fits(
    model_dir: Path, generator: FakeGenerator
) -> None:
    gateway = make_gateway(model_dir, generator, GatewayConfig(default_max_tokens=10))
    async with in_process(gateway) as client:
        for prompt in ([5], [5] * (CONTEXT_LENGTH - 3)):
            assert (await client.post("/v1/completions", json={"prompt": prompt})).status_code == 200
    assert [request.sampling.max_tokens for request in generator.requests] == [10, 3]


async def test_context_is_the_workers_when_theirs_is_shorter(
    raw: httpx.AsyncClient, generator: FakeGenerator
) -> None:
    generator.info = type(generator.info)(context_length=20)
    assert (await raw.post("/v1/completions", json={"prompt": [5] * 20})).status_code == 400
    assert (await raw.post("/v1/completions", json={"prompt": [5] * 19})).status_code == 200

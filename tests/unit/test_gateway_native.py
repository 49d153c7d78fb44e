"""SGLang's native routes, and what a gateway says of itself."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import httpx

from phloem.services.gateway.generation import GeneratedTokens
from phloem.shared.errors import unavailable
from tests.support.gateway import (
    END,
    REPLY,
    FakeGenerator,
    encode,
    events_of,
)


async def test_generate_answers_as_sglang_does(
    raw: httpx.AsyncClient, generator: FakeGenerator, model_dir: Path
) -> None:
    ids = encode(model_dir, REPLY)
    one = (await raw.post("/generate", json={"text": "hello"})).json()
    assert (one["text"], one["output_ids"]) == (REPLY, [*ids, END])
    meta = one["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": END}
    assert (meta["completion_tokens"], meta["cached_tokens"]) == (len(ids) + 1, 0)
    assert meta["e2e_latency"] > 0
    body = {"input_ids": [[5], [6, 7]], "sampling_params": {"max_new_tokens": 2, "sampling_seed": 9}}
    many = (await raw.post("/generate", json=body)).json()
    assert [answer["meta_info"]["prompt_tokens"] for answer in many] == [1, 2]
    assert many[0]["meta_info"]["finish_reason"] == {"type": "length", "length": 2}
    assert generator.requests[-1].sampling.seed == 9
    stopped = await raw.post("/generate", json={"text": "x", "sampling_params": {"stop": "wör"}})
    assert stopped.json()["meta_info"]["finish_reason"] == {"type": "stop", "matched": "wör"}
    assert generator.requests[0].sampling.max_tokens == 128


async def test_generate_streams_all_text_so_far(raw: httpx.AsyncClient) -> None:
    response = await raw.post("/generate", json={"text": "hello", "stream": True})
    *events, done = events_of(response.text)
    texts = [json.loads(event)["text"] for event in events]
    assert done == "[DONE]"
    assert texts[-1] == REPLY
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    body = {"text": ["a", "b"], "stream": True, "sampling_params": {"max_new_tokens": 1}}
    batch = events_of((await raw.post("/generate", json=body)).text)
    assert {json.loads(event)["index"] for event in batch[:-1]} == {0, 1}


async def test_model_info_tells_of_model_and_cluster(raw: httpx.AsyncClient) -> None:
    info = (await raw.get("/get_model_info")).json()
    assert info["model_path"] == "/models/tiny"
    assert info["is_generation"] is True
    assert (info["context_length"], info["num_prefill_workers"], info["num_decode_workers"]) == (256, 1, 2)


async def test_flush_says_how_many_workers(raw: httpx.AsyncClient, generator: FakeGenerator) -> None:
    response = await raw.post("/flush_cache")
    assert response.text == "Cache flushed on 3 workers.\n"
    assert generator.num_flushes == 1


async def test_health_generate_sends_one_token_through(
    raw: httpx.AsyncClient, generator: FakeGenerator
) -> None:
    assert (await raw.get("/health_generate")).json() == {"status": "ok"}
    assert generator.requests[0].sampling.max_tokens == 1
    generator.script = lambda request: [unavailable("no worker")]
    response = await raw.get("/health_generate")
    assert (response.status_code, response.json()["error"]["message"]) == (503, "no worker")


async def test_timeline_comes_on_request(raw: httpx.AsyncClient, generator: FakeGenerator) -> None:
    generator.script = lambda request: [
        GeneratedTokens([50], timeline={"prefilled": 0.5}, finish_reason="length")
    ]
    headers = {"x-phloem-timeline": "1"}
    for path, prompt in (("/v1/completions", {"prompt": "x"}), ("/generate", {"text": "x"})):
        response = await raw.post(path, json=prompt, headers=headers)
        extra = response.json()["phloem"]
        assert extra["request_id"] == response.headers["x-request-id"]
        assert 0.5 < extra["timeline"]["prefilled"] < 5.0
        assert 0 < extra["timeline"]["gateway_first_token"] <= extra["timeline"]["gateway_finished"]
    messages = [{"role": "user", "content": "x"}]
    body = {"messages": messages, "stream": True}
    events = events_of((await raw.post("/v1/chat/completions", json=body, headers=headers)).text)
    assert json.loads(events[-2])["phloem"]["timeline"]["prefilled"] > 0.5
    assert "phloem" not in (await raw.post("/v1/chat/completions", json={"messages": messages})).json()


async def test_metrics_count_requests_and_tokens(raw: httpx.AsyncClient, model_dir: Path) -> None:
    await raw.post("/v1/completions", json={"prompt": [5, 6, 7]})
    await raw.post("/v1/completions", json={"prompt": [5, 6, 7], "top_p": 9})
    await raw.get("/nope/1")
    await raw.get("/nope/2")
    text = (await raw.get("/metrics")).text
    generated = len(encode(model_dir, REPLY)) + 1
    for line in (
        'phloem_gateway_requests_total{route="/v1/completions",status="200"} 1.0',
        'phloem_gateway_requests_total{route="/v1/completions",status="400"} 1.0',
        'phloem_gateway_requests_total{route="(none)",status="404"} 2.0',
        "phloem_gateway_prompt_tokens_total 3.0",
        f"phloem_gateway_generated_tokens_total {float(generated)}",
        "phloem_gateway_time_to_first_token_seconds_count 1.0",
        f"phloem_gateway_inter_token_latency_seconds_count {float(generated - 1)}",
        "phloem_gateway_inflight_sequences 0.0",
    ):
        assert line in text

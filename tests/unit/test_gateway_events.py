"""The events of a stream: their bytes, and the usage in them."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from phloem.services.gateway.api.openai_types import ChatChunkChoice, ChatCompletionChunk, ChatDelta
from phloem.services.gateway.api.text_event import TEXT, TextEvent
from tests.support.gateway import (
    REPLY,
    FakeGenerator,
    encode,
    events_of,
    in_process,
    make_gateway,
    reply_script,
)

BODIES: dict[str, dict[str, object]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}


@pytest.mark.parametrize("text", ["word", "", '"quoted"\\', "wörld 👋🏽", "\x00\x1f\x7f\u2028", "}],", TEXT])
def test_a_text_event_has_the_bytes_of_the_whole_chunk(text: str) -> None:
    def chunk(content: str) -> bytes:
        choice = ChatChunkChoice(3, ChatDelta(content=content))
        return msgspec.json.encode(
            ChatCompletionChunk(
                id="chatcmpl-1",
                created=1,
                model='a "model"',
                system_fingerprint="f",
                choices=[choice],
                usage=None,
            )
        )

    assert TextEvent(chunk(TEXT)).of(text) == chunk(text)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("n", [1, 2])
async def test_usage_can_be_in_every_chunk(model_dir: Path, path: str, n: int) -> None:
    ids = encode(model_dir, REPLY)
    gateway = make_gateway(model_dir, FakeGenerator(reply_script(ids)))
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with in_process(gateway) as client:
        response = await client.post(
            path, json=BODIES[path] | {"n": n, "stream": True, "stream_options": options}
        )
    *chunks, last = [json.loads(event) for event in events_of(response.text)[:-1]]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == n * (len(ids) + 1)
    for index in range(n):
        counts = [
            chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["choices"][0]["index"] == index
        ]
        assert counts == sorted(counts)
        assert counts[-1] == len(ids) + 1  # the end token counts
        assert all(chunk["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"] for chunk in chunks)


@pytest.mark.parametrize(
    ("options", "in_chunks"),
    [(None, "absent"), ({"continuous_usage_stats": True}, "absent"), ({"include_usage": True}, "null")],
)
async def test_chunks_have_no_usage_unless_asked_for(
    model_dir: Path, options: dict[str, bool] | None, in_chunks: str
) -> None:
    gateway = make_gateway(model_dir, FakeGenerator(reply_script(encode(model_dir, REPLY))))
    body = {"prompt": "x", "stream": True, "stream_options": options}
    async with in_process(gateway) as client:
        response = await client.post("/v1/completions", json=body)
    chunks = [json.loads(event) for event in events_of(response.text)[:-1]]
    texts = [chunk for chunk in chunks if chunk["choices"]]
    assert all(chunk.get("usage", "absent") == (None if in_chunks == "null" else "absent") for chunk in texts)
    assert len(chunks) - len(texts) == (in_chunks == "null")

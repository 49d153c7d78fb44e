"""Tokens that come faster than they can leave: merged into fewer events, none lost, nobody else held up."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client import CollectorRegistry

from phloem.services.gateway.app import create_app
from phloem.services.gateway.cluster.client import ClusterClient
from phloem.services.gateway.cluster.delivery import Delivery
from phloem.services.gateway.cluster.live_request import LiveRequest
from phloem.services.gateway.config import GatewayConfig
from phloem.services.gateway.gateway import Gateway
from phloem.services.gateway.generation import GenerationRequest
from phloem.services.gateway.http_server import bind, serve_http
from phloem.services.gateway.metrics import GatewayMetrics
from phloem.services.gateway.served_model import ServedModel
from phloem.services.gateway.text.loading import load_prompt_encoder
from phloem.shared.discovery.registry import Registry
from phloem.shared.protocol.session import Ended, SamplingParams, Submit, TokensOut
from tests.support.fake_worker import FakeWorker, fake_worker
from tests.support.gateway import encode, events_of
from tests.support.waiting import until

SECRET = b"secret"
SOCKET_BYTES = 4096  # of buffer, where the system would take megabytes
LONG_NAME = "m" * 20_000  # is in every event, so that a few of them fill what can wait


class Served(NamedTuple):
    port: int
    client: ClusterClient
    worker: FakeWorker


@pytest.fixture
async def served(registry: Registry, model_dir: Path) -> AsyncIterator[Served]:
    """A whole gateway over one scripted worker, with small socket buffers."""
    metrics = GatewayMetrics()
    listener = bind("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    stop = asyncio.Event()
    async with (
        fake_worker(registry, "u", "unified", SECRET) as worker,
        ClusterClient(registry, SECRET, "g", CollectorRegistry()) as client,
    ):
        model = ServedModel(name=LONG_NAME, path="/tiny", context_length=1000, vocab_size=400, created=1)
        encoder = load_prompt_encoder(model_dir, num_threads=1)
        app = create_app(Gateway(GatewayConfig(), client, encoder, model, metrics), SECRET, on_loopback=True)
        port = listener.getsockname()[1]
        serving = asyncio.create_task(serve_http(app, listener, stop, drain_timeout_s=5.0))
        await until(lambda: worker.ref in client.workers())
        yield Served(port, client, worker)
        stop.set()
        await serving
        encoder.close()


@asynccontextmanager
async def streaming(port: int, max_tokens: int) -> AsyncIterator[asyncio.StreamReader]:
    """A client that has asked for a stream and reads only what the test reads."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=raw, limit=SOCKET_BYTES)
    body = {"prompt": "x", "max_tokens": max_tokens, "stream": True}
    data = json.dumps(body | {"stream_options": {"include_usage": True}})
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write((head + data).encode())
    await writer.drain()
    yield reader
    writer.close()
    await writer.wait_closed()


async def events_in(reader: asyncio.StreamReader) -> list[dict[str, object]]:
    """All events of the answer, up to `[DONE]`."""
    await reader.readuntil(b"\r\n\r\n")
    pieces = []
    async with asyncio.timeout(30):
        while size := int((await reader.readline()).strip(), 16):
            pieces.append(await reader.readexactly(size))
            await reader.readexactly(2)
    *events, done = events_of(b"".join(pieces).decode())
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def text_of(events: list[dict[str, object]]) -> str:
    return "".join(choice["text"] for event in events for choice in event["choices"])  # type: ignore[attr-defined]


async def say_all(served: Served, submit: Submit, token_ids: list[int]) -> None:
    """A message per token, and the end; returns when the gateway has heard all."""
    before = served.client.heard(served.worker.ref)
    for index, token_id in enumerate(token_ids):
        last = index == len(token_ids) - 1
        tokens = TokensOut(submit.request_id, submit.attempt, index, [token_id], "length" if last else None)
        ended = [Ended(submit.request_id, submit.attempt, "finished")] if last else []
        served.worker.send(tokens, *ended)
    await until(lambda: served.client.heard(served.worker.ref) - before == len(token_ids))


async def test_a_client_that_reads_slowly_gets_all_text_in_fewer_events(
    served: Served, model_dir: Path
) -> None:
    phrase = "the user and the assistant say hello to the wörld 👋🏽 "
    words = encode(model_dir, phrase)
    repeats = 900 // len(words)
    token_ids = words * repeats
    async with streaming(served.port, len(token_ids)) as reader:
        await say_all(served, await served.worker.next_submit(), token_ids)
        # All is here, and the worker done; but most of it can't leave yet.
        assert not served.client.is_idle
        async with streaming(served.port, 1) as other:
            await say_all(served, await served.worker.next_submit(2), words[:1])
            assert text_of(await events_in(other)) == "the"
        *texts, usage = await events_in(reader)
    assert text_of(texts) == phrase * repeats
    assert usage["usage"]["completion_tokens"] == len(token_ids)  # type: ignore[index]
    assert len(texts) < len(token_ids) / 2
    await until(lambda: served.client.is_idle)


def live_request() -> LiveRequest:
    request = GenerationRequest(
        request_id="r", token_ids=[1], sampling=SamplingParams(max_tokens=4), timeout_s=60.0
    )
    return LiveRequest(request, 1)


async def test_news_reach_an_idle_consumer_at_once() -> None:
    delivery, live = Delivery(), live_request()
    for _ in range(3):
        news = live.news(grace_s=1.0)
        delivery.add(live)
        async with asyncio.timeout(5):
            await news
    live.close()


async def test_a_pause_is_bounded() -> None:
    delivery, live = Delivery(max_pause_s=0.001), live_request()
    delivery.add(live)
    await live.news(grace_s=1.0)
    time.sleep(1.0)  # noqa: ASYNC251 - something else kept the loop
    resumed = time.perf_counter()
    delivery.add(live)
    async with asyncio.timeout(5):
        await live.news(grace_s=1.0)
    assert time.perf_counter() - resumed < 0.9
    live.close()


async def test_consumers_that_take_long_are_woken_less_often() -> None:
    """A delivery that cost 50 ms is followed by as long a pause, in which news are merged."""
    delivery, live, busy_s = Delivery(max_pause_s=10.0), live_request(), 0.05
    news = live.news(grace_s=1.0)
    delivery.add(live)
    await news
    time.sleep(busy_s)  # noqa: ASYNC251 - what a busy event loop does
    busy_until = time.perf_counter()
    news = live.news(grace_s=1.0)
    for _ in range(20):
        delivery.add(live)
        await asyncio.sleep(0)
    assert not news.done()
    async with asyncio.timeout(5):
        await news
    assert time.perf_counter() - busy_until >= 0.9 * busy_s
    assert not live.news(grace_s=1.0).done()  # the twenty were one
    live.close()


async def test_the_pause_grows_while_news_come_faster_than_deliveries() -> None:
    delivery, live = Delivery(max_pause_s=10.0), live_request()
    pauses = []
    for _ in range(3):
        for _ in range(5):
            delivery.add(live)
        await live.news(grace_s=1.0)
        time.sleep(0.02)  # noqa: ASYNC251 - what a busy event loop does
        pauses.append(-time.perf_counter())
        for _ in range(5):
            delivery.add(live)
        async with asyncio.timeout(10):
            await live.news(grace_s=1.0)
        pauses[-1] += time.perf_counter()
    assert pauses[0] >= 2 * 0.9 * 0.02
    assert pauses[1] >= 8 * 0.9 * 0.02
    live.close()

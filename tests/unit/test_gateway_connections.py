"""Clients that leave, stall, lie about lengths; servers that stop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from phloem.services.gateway.api.json_body import read_body
from phloem.services.gateway.app import create_app
from phloem.services.gateway.config import GatewayConfig
from phloem.services.gateway.gateway import Gateway
from phloem.services.gateway.generation import GeneratedTokens
from phloem.services.gateway.http_server import MAX_HEAD_BYTES, bind, serve_http
from phloem.shared.errors import ConfigError, PhloemError
from tests.support.gateway import (
    REPLY,
    SECRET,
    FakeGenerator,
    encode,
    in_process,
    make_gateway,
    over_http,
    reply_script,
)
from tests.support.waiting import until

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def generator(model_dir: Path) -> FakeGenerator:
    """Gives one token, then waits for the gate."""
    generator = FakeGenerator(reply_script(encode(model_dir, REPLY)))
    generator.gate = asyncio.Event()
    return generator


@pytest.fixture
def gateway(model_dir: Path, generator: FakeGenerator) -> Gateway:
    return make_gateway(model_dir, generator)


@pytest.fixture
async def url(gateway: Gateway) -> AsyncIterator[str]:
    async with over_http(gateway) as url:
        yield url


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def send_json(writer: asyncio.StreamWriter, path: str, body: object) -> None:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_aborts_every_sequence(
    gateway: Gateway, generator: FakeGenerator, url: str, stream: bool, n: int
) -> None:
    _, writer = await connect(url)
    await send_json(writer, "/v1/chat/completions", CHAT | {"stream": stream, "n": n})
    await until(lambda: generator.num_running == n)
    writer.close()
    await writer.wait_closed()
    await until(lambda: len(generator.closed) == n)
    await until(lambda: gateway.admission.num_inflight == 0)
    assert generator.num_running == 0
    counted = 'phloem_gateway_requests_total{route="/v1/chat/completions",status="499"} 1.0'
    await until(lambda: counted in gateway.metrics.exposition().decode())


async def test_tokens_are_sent_as_they_come(generator: FakeGenerator, url: str) -> None:
    body = CHAT | {"stream": True}
    async with (
        httpx.AsyncClient() as client,
        client.stream("POST", f"{url}/v1/chat/completions", json=body) as response,
    ):
        lines = response.aiter_lines()
        async with asyncio.timeout(10):
            first = [await anext(lines) for _ in range(3)]
        assert '"role":"assistant"' in first[0]
        assert generator.num_running == 1  # the rest still waits for the gate
        assert generator.gate is not None
        generator.gate.set()
        rest = [line async for line in lines]
    assert rest[-2] == "data: [DONE]"


async def test_a_client_that_does_not_read_holds_up_only_itself(generator: FakeGenerator, url: str) -> None:
    assert generator.gate is not None
    generator.gate.set()
    ordinary = generator.script
    # /generate repeats all text so far: far more than any socket buffers.
    endless = [GeneratedTokens([50])] * 5000

    generator.script = lambda request: endless
    _, slow = await connect(url)
    await send_json(slow, "/generate", {"text": "x", "stream": True})
    await until(lambda: generator.num_running == 1)
    generator.script = ordinary
    async with httpx.AsyncClient() as client:
        response = await client.post(f"{url}/v1/chat/completions", json=CHAT)
    assert response.status_code == 200
    assert generator.num_running == 1
    slow.close()
    await until(lambda: generator.num_running == 0)


async def test_a_request_ends_at_its_deadline(model_dir: Path, generator: FakeGenerator) -> None:
    gateway = make_gateway(model_dir, generator, GatewayConfig(request_timeout_s=0.05))
    gateway.deadline_slack_s = 0.05
    async with in_process(gateway) as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
    assert generator.num_running == 0


async def test_a_client_that_never_reads_holds_nothing_past_the_deadline(
    model_dir: Path, generator: FakeGenerator, caplog: pytest.LogCaptureFixture
) -> None:
    assert generator.gate is not None
    generator.gate.set()
    generator.script = lambda request: [GeneratedTokens([50])] * 5000  # far more than any socket buffers
    gateway = make_gateway(model_dir, generator, GatewayConfig(request_timeout_s=0.3))
    gateway.deadline_slack_s = 0.2
    caplog.set_level("INFO")
    async with over_http(gateway) as url:
        _, stuck = await connect(url)
        await send_json(stuck, "/generate", {"text": "x", "stream": True})
        await until(lambda: any(record.message == "request" for record in caplog.records))
        stuck.transport.abort()
    (line,) = [vars(record) for record in caplog.records if record.message == "request"]
    assert (line["status"], line["error"]) == (499, "request_timeout")
    assert generator.num_running == 0


async def test_health_generate_gives_up_at_its_deadline(model_dir: Path, generator: FakeGenerator) -> None:
    gateway = make_gateway(model_dir, generator, GatewayConfig(health_generate_timeout_s=0.05))
    generator.script = lambda request: [GeneratedTokens([]), GeneratedTokens([5], "length")]
    async with in_process(gateway) as client:
        response = await client.get("/health_generate")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unhealthy")


async def test_the_log_line_says_how_it_ended(
    generator: FakeGenerator, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    assert generator.gate is not None
    generator.gate.set()
    caplog.set_level("INFO")
    async with in_process(gateway) as client:
        good = await client.post("/v1/chat/completions", json=CHAT)
        bad = await client.post("/v1/chat/completions", json=CHAT | {"n": 0})
        await client.get("/health")
    lines = [vars(record) for record in caplog.records if record.message == "request"]
    assert [line["status"] for line in lines] == [200, 400]
    assert lines[0]["route"] == "/v1/chat/completions"
    assert lines[0]["generated_tokens"] == good.json()["usage"]["completion_tokens"]
    assert lines[0]["prompt_tokens"] == good.json()["usage"]["prompt_tokens"]
    assert lines[1]["error"] == bad.json()["error"]["code"]


async def test_the_log_line_has_the_clients_own_name_of_the_request_within_bounds(
    generator: FakeGenerator, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with in_process(gateway) as client:
        await client.get("/v1/models", headers={"x-request-id": "bench-0-1-2"})
        await client.get("/v1/models", headers={b"x-request-id": b"\x9b" + b"x" * 1000})
        answered = await client.get("/v1/models")
    lines = [vars(record) for record in caplog.records if record.message == "request"]
    assert lines[0]["client_request_id"] == "bench-0-1-2"
    assert lines[1]["client_request_id"] == "\\x9b" + "x" * 127
    assert "client_request_id" not in lines[2]
    assert answered.headers["x-request-id"].startswith("req-")


async def test_a_body_that_stalls_is_a_408() -> None:
    async def never() -> object:
        return await asyncio.Event().wait()

    with pytest.raises(PhloemError) as caught:
        await read_body(never, None, max_bytes=10, timeout_s=0.05)  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.info.http_status) == ("request_timeout", 408)


async def test_a_client_that_leaves_before_its_body_is_not_an_error(gateway: Gateway, url: str) -> None:
    _, writer = await connect(url)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\nabc")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    counted = 'phloem_gateway_requests_total{route="/v1/completions",status="499"} 1.0'
    await until(lambda: counted in gateway.metrics.exposition().decode())


@pytest.mark.parametrize("ends_line", [True, False])
async def test_an_endless_head_is_cut_off(url: str, ends_line: bool) -> None:
    reader, writer = await connect(url)
    writer.write(b"GET /health HTTP/1.1\r\nx: ")
    piece = b"a" * 1000 + (b"\r\nx: " if ends_line else b"")
    writer.write(piece * (MAX_HEAD_BYTES // len(piece)))
    await writer.drain()
    writer.write(piece)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 431")


async def test_bytes_that_are_no_http_get_the_same_error_shape(url: str) -> None:
    reader, writer = await connect(url)
    writer.write(b"\x16\x03\x01 hello\r\n\r\n")
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


async def test_a_big_body_after_a_small_head_is_no_long_head(url: str) -> None:
    body = CHAT | {"padding": "x" * (2 * MAX_HEAD_BYTES), "max_tokens": 1}
    async with httpx.AsyncClient() as client:
        for _ in range(2):
            assert (await client.post(f"{url}/v1/chat/completions", json=body)).status_code == 200


async def test_stopping_waits_for_requests_under_way(gateway: Gateway, generator: FakeGenerator) -> None:
    listener, stop = bind("127.0.0.1", 0), asyncio.Event()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    serving = asyncio.create_task(
        serve_http(create_app(gateway, SECRET, on_loopback=True), listener, stop, drain_timeout_s=10)
    )
    async with httpx.AsyncClient() as client:
        request = asyncio.create_task(client.post(f"{url}/v1/chat/completions", json=CHAT))
        await until(lambda: generator.num_running == 1)
        stop.set()
        with pytest.raises(httpx.TransportError):
            async with asyncio.timeout(10):
                while True:
                    async with httpx.AsyncClient() as other:
                        await other.get(f"{url}/health")
        assert generator.gate is not None
        generator.gate.set()
        assert (await request).status_code == 200
    await serving


async def test_stopping_aborts_what_lasts_too_long(gateway: Gateway, generator: FakeGenerator) -> None:
    listener, stop = bind("127.0.0.1", 0), asyncio.Event()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    serving = asyncio.create_task(
        serve_http(create_app(gateway, SECRET, on_loopback=True), listener, stop, drain_timeout_s=1)
    )
    _, writer = await connect(url)
    await send_json(writer, "/v1/chat/completions", CHAT | {"stream": True})
    await until(lambda: generator.num_running == 1)
    stop.set()
    async with asyncio.timeout(10):
        await serving
    await until(lambda: generator.num_running == 0)
    assert len(generator.closed) == 1
    writer.close()


def test_a_port_in_use_is_a_config_error_with_a_hint() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="--port"):
        bind("127.0.0.1", taken.getsockname()[1])


def test_a_host_that_is_not_ours_is_a_config_error() -> None:
    with pytest.raises(ConfigError):
        bind("203.0.113.1", 0)

"""The gateway as a process: it starts small and fast, serves over a real worker front, drains, exits 0."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from phloem.services.gateway.config import GatewayConfig
from phloem.services.gateway.http_server import bind
from phloem.services.gateway.main import run
from phloem.shared.discovery.registry import Registry
from phloem.shared.errors import ConfigError, PhloemError
from tests.support.gateway import MODEL, make_model_dir
from tests.support.valkey import ValkeyServer, free_port
from tests.support.waiting import until_async
from tests.support.worker_front import SECRET, running_front

MAX_RESIDENT_BYTES = 250 * 1024 * 1024
MAX_START_CPU_S = 2.0
MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "eos_token_id": 2,
}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    path = tmp_path / "gateway-model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(MODEL_CONFIG))
    return make_model_dir(path)


@asynccontextmanager
async def serving(model_dir: Path, redis_url: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """`phloem serve gateway`, once it answers: the process and its URL."""
    port = free_port()
    flags = {
        "--port": str(port),
        "--model-path": str(model_dir),
        "--served-model-name": MODEL,
        "--redis-url": redis_url,
        "--cluster-secret": SECRET,
        "--drain-timeout-s": "5",
        "--worker-wait-s": "0.2",
    }
    argv = [word for flag in flags.items() for word in flag]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from phloem.cli.main import main; main()", "serve", "gateway", *argv
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient() as client:
            await until_async(lambda: healthy(client, url, process), 30.0)
        yield process, url
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def healthy(client: httpx.AsyncClient, url: str, process: asyncio.subprocess.Process) -> bool:
    assert process.returncode is None, "the gateway ended before it served"
    try:
        return (await client.get(f"{url}/health")).status_code == 200
    except httpx.TransportError:
        return False


async def test_gateway_serves_over_a_worker_and_stops_on_sigterm(
    valkey: ValkeyServer, model_dir: Path, tmp_path: Path
) -> None:
    async with (
        running_front(valkey.url, tmp_path),
        serving(model_dir, valkey.url) as (process, url),
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        usage = psutil.Process(process.pid)
        times = usage.cpu_times()
        assert times.user + times.system < MAX_START_CPU_S
        answer = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=7
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 7
        assert usage.memory_info().rss < MAX_RESIDENT_BYTES
        mapped = " ".join(library.path for library in usage.memory_maps())
        assert not any(name in mapped for name in ("/torch/", "/numpy/"))
        async with httpx.AsyncClient() as http:
            text = (await http.get(f"{url}/metrics")).text
            assert "phloem_gateway_generated_tokens_total 7.0" in text
        registry = Registry(valkey.url)
        assert len((await registry.read()).services) == 1
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await process.wait() == 0
        assert (await registry.read()).services == {}
        await registry.close()


async def test_requests_without_workers_get_a_clear_503(valkey: ValkeyServer, model_dir: Path) -> None:
    async with serving(model_dir, valkey.url) as (_, url), httpx.AsyncClient(timeout=30) as client:
        started = time.monotonic()
        response = await client.post(
            f"{url}/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 1}
        )
        assert time.monotonic() - started < 20
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "server_error"
        assert "retry-after" in response.headers


async def test_a_port_in_use_is_refused_at_start(model_dir: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        config = GatewayConfig(model_path=str(model_dir), port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="--port"):
            await run(config)


@pytest.mark.parametrize("model_path", ["/nowhere/model", "no-such-model"])
async def test_a_model_that_is_not_there_is_refused_at_start(model_path: str) -> None:
    with pytest.raises(PhloemError, match="model"):
        await run(GatewayConfig(model_path=model_path, port=0))


async def test_redis_that_is_away_is_waited_for_with_a_bound(model_dir: Path) -> None:
    config = GatewayConfig(
        model_path=str(model_dir),
        port=0,
        redis_url=f"redis://127.0.0.1:{free_port()}/0",
        redis_wait_s=0.3,
    )
    with pytest.raises(PhloemError) as caught:
        await run(config)
    assert caught.value.code == "redis_unreachable"

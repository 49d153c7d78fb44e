"""A device that never ends a step: requests keep their deadlines; the worker says what is wrong, and ends."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from phloem.shared.discovery.registry import Registry
from phloem.shared.engine.config import EngineOptions
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import Ended, Hello, SamplingParams, StepMessage, Submit, TokensOut
from phloem.shared.worker.config import WorkerConfig
from tests.support import stalling_engine
from tests.support.transfer_lab import tiny_model
from tests.support.valkey import ValkeyServer
from tests.support.waiting import until_async
from tests.support.worker_front import Front, running_front

HANG_TIMEOUT_S = 3.0
NOTICED_WITHIN_S = HANG_TIMEOUT_S + 4.0
ENGINE = (sys.executable, "-m", stalling_engine.__name__)


def with_real_engine(model_dir: Path) -> Callable[[WorkerConfig], WorkerConfig]:
    options = EngineOptions(
        model_path=str(model_dir), device="cpu", dtype="float32", num_threads=1, max_total_tokens=4096
    )
    return lambda config: msgspec.structs.replace(
        config, engine=options, engine_hang_timeout_s=HANG_TIMEOUT_S
    )


@pytest.fixture
async def front(valkey: ValkeyServer, tmp_path: Path) -> AsyncIterator[Front]:
    model_dir = tiny_model(tmp_path / "model")
    change = with_real_engine(model_dir)
    async with running_front(valkey.url, tmp_path, engine_command=ENGINE, change=change) as front:
        yield front


def submit(front: Front, request_id: str, timeout_s: float) -> Submit:
    return Submit(
        request_id=request_id,
        attempt=1,
        epoch=front.record.epoch,
        phase="both",
        token_ids=[3, 4, 5],
        num_prompt_tokens=3,
        sampling=SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True),
        timeout_s=timeout_s,
    )


async def test_worker_whose_device_hangs_ends_in_time_with_a_sentence(
    front: Front, registry: Registry
) -> None:
    """Also while requests keep coming: what an engine says of them is no sign of life of its device."""
    stream = front.session()
    await stream.write(Hello("g"))
    await stream.write(submit(front, "first", 60.0))
    outputs: list[TokensOut | Ended] = []
    ended_s: dict[str, float] = {}

    async def read() -> None:
        async for message in stream:
            if isinstance(message, StepMessage):
                outputs.extend(message.outputs)
                ended_s.update(
                    (o.request_id, time.monotonic()) for o in message.outputs if isinstance(o, Ended)
                )

    async def keep_asking() -> None:
        while True:
            await asyncio.sleep(0.05)
            await stream.write(submit(front, f"later-{time.monotonic()}", 0.5))

    reading = asyncio.create_task(read())
    while len(outputs) < stalling_engine.STALLED_STEP - 1:
        assert not reading.done()
        await asyncio.sleep(0.01)
    began_s = time.monotonic()
    asking = asyncio.create_task(keep_asking())
    with pytest.raises(PhloemError) as caught:
        await reading
    assert time.monotonic() - began_s < NOTICED_WITHIN_S
    assert (caught.value.code, caught.value.retryable) == ("device_hung", True)
    assert "a step of 1 requests has not ended after 3 s: the device hangs" in str(caught.value)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    late = [o for o in outputs if isinstance(o, Ended) and o.error is not None]
    assert late and all(o.error is not None and o.error.code == "deadline_exceeded" for o in late)
    assert min(ended_s.values()) - began_s < HANG_TIMEOUT_S, "deadlines are kept while the device hangs"
    await asyncio.wait({front.task}, timeout=5.0)
    failure = front.task.exception()
    assert isinstance(failure, ExceptionGroup) and "the device hangs" in str(failure.exceptions[0])

    async def is_gone() -> bool:
        return front.record.worker_id not in (await registry.read()).workers

    await registry.connect(5.0)
    await until_async(is_gone)

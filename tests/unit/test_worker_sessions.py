"""Sessions without a network: bounds, batches, and whose each request is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable

import pytest
from prometheus_client import CollectorRegistry

from phloem.shared.batch_queue import BatchQueue
from phloem.shared.errors import PhloemError, unavailable
from phloem.shared.protocol.cluster import WorkerLoad
from phloem.shared.protocol.engine import (
    AbortGateway,
    EngineMessage,
    EngineSubmit,
    GatewayOutputs,
    StepReport,
)
from phloem.shared.protocol.session import (
    Ended,
    Hello,
    LoadReport,
    PeerRef,
    SessionDown,
    StepMessage,
    TokensOut,
    Welcome,
)
from phloem.shared.worker.gateway_session import MAX_BEFORE_LOAD
from phloem.shared.worker.metrics import WorkerMetrics
from phloem.shared.worker.sessions import Sessions
from tests.support.submits import EPOCH, submit
from tests.support.waiting import until

ME = PeerRef("w1", EPOCH)


def tokens(request_id: str) -> TokensOut:
    return TokensOut(request_id, 1, 0, [5])


async def endless(messages: Iterable[SessionDown]) -> AsyncIterator[SessionDown]:
    """`messages`, and then a gateway that stays connected."""
    for message in messages:
        yield message
    await asyncio.Event().wait()


def sessions_with(outbox: BatchQueue[EngineMessage], *, max_queued_messages: int = 100) -> Sessions:
    metrics = WorkerMetrics(CollectorRegistry())
    return Sessions(ME, "unified", outbox, metrics, max_queued_messages=max_queued_messages)


async def test_all_submissions_that_wait_are_taken_together() -> None:
    outbox: BatchQueue[EngineMessage] = BatchQueue(1000)
    sessions = sessions_with(outbox)
    stream = sessions.serve(endless([Hello("g"), *(submit(str(n)) for n in range(50))]))
    assert isinstance(await anext(stream), Welcome)
    await until(lambda: len(outbox) == 50)
    batch = await outbox.take_all()
    assert [m.submit.request_id for m in batch if isinstance(m, EngineSubmit)] == [str(n) for n in range(50)]
    await stream.aclose()  # type: ignore[attr-defined]


async def test_gateway_that_does_not_read_loses_its_session() -> None:
    outbox: BatchQueue[EngineMessage] = BatchQueue(1000)
    sessions = sessions_with(outbox, max_queued_messages=3)
    slow = sessions.serve(endless([Hello("slow"), submit("a")]))
    quick = sessions.serve(endless([Hello("quick"), submit("b")]))
    await anext(slow)
    await anext(quick)
    await until(lambda: sessions.num_requests == 2)
    for step in range(1, 5):
        sessions.deliver(
            StepReport(step, [GatewayOutputs(1, [tokens("a")]), GatewayOutputs(2, [tokens("b")])])
        )
        assert await anext(quick) == StepMessage(7, step, [tokens("b")])
    assert AbortGateway(1) in await outbox.take_all()
    assert sessions.num_requests == 1
    with pytest.raises(PhloemError) as caught:
        await anext(slow)
    assert (caught.value.code, caught.value.retryable) == ("session_overflow", True)


async def test_every_gateway_is_told_the_load_but_one_that_reads_slowly() -> None:
    sessions = sessions_with(BatchQueue(1000))
    quick = sessions.serve(endless([Hello("quick")]))
    slow = sessions.serve(endless([Hello("slow")]))
    assert isinstance(await anext(quick), Welcome)
    assert isinstance(await anext(slow), Welcome)
    loads = [WorkerLoad(queued_tokens=count) for count in range(1, 1 + 2 * MAX_BEFORE_LOAD)]
    for load in loads:
        sessions.tell_load(load)
        assert await anext(quick) == LoadReport(7, load)
    heard = [await anext(slow) for _ in range(MAX_BEFORE_LOAD)]
    assert heard == [LoadReport(7, load) for load in loads[:MAX_BEFORE_LOAD]]
    sessions.tell_load(loads[0])
    assert await anext(slow) == LoadReport(7, loads[0])
    for stream in (quick, slow):
        await stream.aclose()  # type: ignore[attr-defined]


async def test_full_inbox_refuses_at_once() -> None:
    outbox: BatchQueue[EngineMessage] = BatchQueue(1)
    sessions = sessions_with(outbox)
    stream = sessions.serve(endless([Hello("g"), submit("fits"), submit("refused")]))
    await anext(stream)
    message = await anext(stream)
    assert isinstance(message, StepMessage)
    (ended,) = message.outputs
    assert isinstance(ended, Ended) and ended.error is not None
    assert (ended.request_id, ended.error.code, ended.error.retryable) == ("refused", "overloaded", True)
    assert sessions.num_requests == 1


async def test_outputs_for_a_closed_session_are_dropped() -> None:
    outbox: BatchQueue[EngineMessage] = BatchQueue(10)
    sessions = sessions_with(outbox)
    stream = sessions.serve(endless([Hello("g"), submit("a")]))
    await anext(stream)
    await until(lambda: sessions.num_requests == 1)
    await stream.aclose()  # type: ignore[attr-defined]
    sessions.deliver(StepReport(1, [GatewayOutputs(1, [Ended("a", 1, "aborted")])]))
    assert sessions.num_requests == 0
    assert await outbox.take_all() == [EngineSubmit(1, submit("a")), AbortGateway(1)]


async def test_idle_is_reached_when_the_last_request_ends() -> None:
    outbox: BatchQueue[EngineMessage] = BatchQueue(10)
    sessions = sessions_with(outbox)
    stream = sessions.serve(endless([Hello("g"), submit("a"), submit("b")]))
    await anext(stream)
    await until(lambda: sessions.num_requests == 2)
    waiting = asyncio.create_task(sessions.wait_idle())
    sessions.deliver(StepReport(1, [GatewayOutputs(1, [Ended("a", 1, "finished")])]))
    await anext(stream)
    assert not waiting.done()
    sessions.deliver(StepReport(2, [GatewayOutputs(1, [Ended("b", 1, "finished")])]))
    async with asyncio.timeout(1):
        await waiting


async def test_close_ends_every_session_with_the_error() -> None:
    sessions = sessions_with(BatchQueue(10))
    stream = sessions.serve(endless([Hello("g")]))
    await anext(stream)
    sessions.close(unavailable("gone", code="worker_stopped"))
    with pytest.raises(PhloemError, match="gone"):
        await anext(stream)


async def test_gateway_that_hangs_up_ends_its_session_without_an_error() -> None:
    async def brief() -> AsyncIterator[SessionDown]:
        yield Hello("g")

    stream = sessions_with(BatchQueue(10)).serve(brief())
    assert [type(message) async for message in stream] == [Welcome]


async def test_a_session_that_ends_with_its_worker_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for code, level in (("worker_stopped", "INFO"), ("engine_died", "WARNING")):
        sessions = sessions_with(BatchQueue(10))
        stream = sessions.serve(endless([Hello("g")]))
        await anext(stream)
        sessions.close(unavailable("gone", code=code))
        with pytest.raises(PhloemError):
            await anext(stream)
        ended = [record for record in caplog.records if "session ended" in record.getMessage()]
        assert ended[-1].levelname == level

"""A worker at rest looks after its pages: once, and what it finds can be seen."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from phloem.shared.batch_queue import BatchQueue
from phloem.shared.errors import unavailable
from phloem.shared.protocol.engine import AuditReply, EngineMessage, GatewayOutputs, StepReport
from phloem.shared.protocol.session import Ended, Hello, PeerRef, SessionDown
from phloem.shared.worker.idle_audit import IdleAudit
from phloem.shared.worker.metrics import WorkerMetrics
from phloem.shared.worker.sessions import Sessions
from tests.support.submits import EPOCH, submit
from tests.support.waiting import until

REST_S = 0.02
CLEAN = AuditReply(1, [], 10, 10, 0, 0, 0, 0)


class Worker:
    """Sessions with one gateway, and an audit beside them whose answers are `replies`, the last for ever."""

    def __init__(self, *replies: AuditReply | Exception) -> None:
        self._replies = list(replies)
        self._registry = CollectorRegistry()
        metrics = WorkerMetrics(self._registry)
        outbox: BatchQueue[EngineMessage] = BatchQueue(1000)
        self.sessions = Sessions(PeerRef("w", EPOCH), "unified", outbox, metrics, max_queued_messages=100)
        self._down: asyncio.Queue[SessionDown] = asyncio.Queue()
        self._audit = IdleAudit(self._answer, self.sessions, metrics, rest_s=REST_S)
        self.num_audits = 0

    async def _answer(self) -> AuditReply:
        assert not self.sessions.num_requests
        self.num_audits += 1
        reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
        if isinstance(reply, Exception):
            raise reply
        return reply

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._serve()), asyncio.create_task(self._audit.run())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self) -> None:
        async def messages() -> AsyncIterator[SessionDown]:
            yield Hello("g")
            while True:
                yield await self._down.get()

        async for _ in self.sessions.serve(messages()):
            pass

    async def begin(self, name: str) -> None:
        taken = self.sessions.num_taken
        self._down.put_nowait(submit(name))
        await until(lambda: self.sessions.num_taken > taken)

    def end(self, name: str) -> None:
        self.sessions.deliver(StepReport(1, [GatewayOutputs(1, [Ended(name, 1, "finished")])]))

    def metric(self, name: str) -> float | None:
        return self._registry.get_sample_value(f"phloem_engine_page_{name}")


async def test_pages_are_audited_once_after_the_last_request() -> None:
    worker = Worker(CLEAN)
    async with worker.running():
        for name in ("a", "b"):
            await worker.begin(name)
        worker.end("a")
        await asyncio.sleep(3 * REST_S)
        assert worker.num_audits == 0, "a request is there"
        worker.end("b")
        await until(lambda: worker.num_audits == 1)
        await asyncio.sleep(3 * REST_S)
        assert worker.num_audits == 1, "nothing has happened since"
        await worker.begin("c")
        worker.end("c")
        await until(lambda: worker.num_audits == 2)
    assert (worker.metric("audits_total"), worker.metric("audit_problems")) == (2.0, 0.0)


async def test_what_is_wrong_is_a_metric_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(AuditReply(1, ["page 3 has no owner", "page 4 has two"], 10, 8, 0, 0, 0, 0))
    async with worker.running():
        await worker.begin("a")
        worker.end("a")
        await until(lambda: worker.metric("audit_problems") == 2.0)
    assert "page 3 has no owner" in caplog.text


async def test_an_engine_that_does_not_answer_is_asked_again_after_the_next_request() -> None:
    worker = Worker(unavailable("not now"), CLEAN)
    async with worker.running():
        for count in (1, 2):
            await worker.begin(f"r{count}")
            worker.end(f"r{count}")
            await until(lambda count=count: worker.num_audits == count)  # type: ignore[misc]
    assert worker.metric("audits_total") == 1.0

"""Workers that answer at once: real leases, sessions and messages, no model.

    python -m benchmarks.gateway.workers REDIS_URL SECRET TOKENS_FILE ROLE...

As real workers do, each sends one message per step with a token of every stream that runs. Lines on stdin
set the time between steps in seconds; 0, the default: as fast as the session takes them. Streams all say
the tokens of TOKENS_FILE (a JSON list), over and over.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import uvloop

from phloem.shared.discovery.registry import Registry
from phloem.shared.protocol.cluster import Role, WorkerLoad
from phloem.shared.protocol.session import (
    Abort,
    Ended,
    EndReason,
    Hello,
    Output,
    Phase,
    SessionDown,
    SessionUp,
    StepMessage,
    Submit,
    TokensOut,
    Welcome,
    session_down,
    session_up,
)
from phloem.shared.protocol.worker_rpc import WORKER_SERVICE
from phloem.shared.rpc.server import RpcServer
from tests.support.worker_records import new_record

_HEARTBEAT_S = 1.0
# A busy machine is no dead worker.
_REDIS_TIMEOUT_S = 30.0
_LEASE_TTL_S = 60.0
# By phase: the first token that the worker says, and how its part ends.
_FIRST: dict[Phase, int] = {"prefill": 0, "decode": 1, "both": 0}
_TIMELINE = {"queued": 0.0001, "matched": 0.0002, "computed": 0.0003}


def until_tick(now: float, interval_s: float) -> float:
    """Seconds to the next tick. A timer may fire a little before its tick, which then counts as past."""
    return (round(now / interval_s) + 1) * interval_s - now


class Pace:
    """Time between steps, on one clock for all sessions."""

    def __init__(self) -> None:
        self.interval_s = 0.0

    async def next_step(self) -> None:
        if self.interval_s:
            await asyncio.sleep(until_tick(asyncio.get_running_loop().time(), self.interval_s))


class Stream:
    """One worker's part of one request."""

    def __init__(self, submit: Submit, text: list[int]) -> None:
        self._submit = submit
        self._text = text
        self._next = _FIRST[submit.phase]
        self._end = 1 if submit.phase == "prefill" else submit.sampling.max_tokens
        self._timeline = _TIMELINE

    def step(self) -> list[Output]:
        """The next token, and the end with the last one."""
        submit, index = self._submit, self._next
        self._next += 1
        over = self._next >= self._end
        finished = self._next == submit.sampling.max_tokens
        timeline, self._timeline = self._timeline, {}
        tokens = TokensOut(
            submit.request_id,
            submit.attempt,
            index,
            [self._text[index % len(self._text)]],
            "length" if finished else None,
            timeline=timeline,
        )
        return [tokens, self.ended("finished" if finished else "handed_over")] if over else [tokens]

    def ended(self, reason: EndReason) -> Ended:
        return Ended(self._submit.request_id, self._submit.attempt, reason)


class AnsweringWorker:
    def __init__(self, worker_id: str, role: Role, secret: bytes, text: list[int], pace: Pace) -> None:
        self._worker_id = worker_id
        self._role: Role = role
        self._text = text
        self._pace = pace
        self._server = RpcServer(secret)
        self._server.add_stream(WORKER_SERVICE, "Session", session_down, session_up, self._serve)
        self._epoch = 0

    async def run(self, registry: Registry) -> None:
        port = await self._server.start("127.0.0.1", 0)
        self._epoch = await registry.next_epoch()
        record = new_record(
            self._worker_id,
            self._role,
            epoch=self._epoch,
            rpc_address=f"127.0.0.1:{port}",
            context_length=131_072,
            kv_bytes_per_token=100_000,
            max_running_requests=256,
            load=WorkerLoad(free_pages=100_000, total_pages=100_000),
        )
        while True:
            await registry.renew_worker(record)
            await asyncio.sleep(_HEARTBEAT_S)

    async def _serve(self, messages: AsyncIterator[SessionDown]) -> AsyncIterator[SessionUp]:
        assert isinstance(await anext(messages), Hello)
        yield Welcome(self._worker_id, self._epoch, self._role)
        session = Session(self._text)
        reading = asyncio.create_task(session.read(messages))
        step = 0
        try:
            while True:
                await session.has_work.wait()
                await self._pace.next_step()
                step += 1
                yield StepMessage(self._epoch, step, session.step())
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


class Session:
    """What one gateway has under way here."""

    def __init__(self, text: list[int]) -> None:
        self.has_work = asyncio.Event()
        self._text = text
        self._running: dict[str, Stream] = {}
        self._waiting: dict[str, Stream] = {}
        self._ends: list[Output] = []

    async def read(self, messages: AsyncIterator[SessionDown]) -> None:
        async for message in messages:
            match message:
                case Submit(request_id=request_id, phase="decode") if message.sampling.max_tokens == 1:
                    # The prefill worker's only token ends it: the gateway's abort is the end here.
                    self._waiting[request_id] = Stream(message, self._text)
                case Submit(request_id=request_id):
                    self._running[request_id] = Stream(message, self._text)
                case Abort(request_id):
                    stream = self._running.pop(request_id, None) or self._waiting.pop(request_id, None)
                    if stream is not None:
                        self._ends.append(stream.ended("aborted"))
            if self._running or self._ends:
                self.has_work.set()

    def step(self) -> list[Output]:
        """What one engine step says to the gateway."""
        outputs, self._ends = self._ends, []
        for request_id, stream in list(self._running.items()):
            said = stream.step()
            outputs += said
            if isinstance(said[-1], Ended):
                del self._running[request_id]
        if not self._running:
            self.has_work.clear()
        return outputs


async def follow_stdin(pace: Pace) -> None:
    """Ends the process when the benchmark is gone."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        pace.interval_s = float(line)
    raise SystemExit


async def serve(url: str, secret: str, text: list[int], roles: list[Role]) -> None:
    registry = Registry(url, timeout_s=_REDIS_TIMEOUT_S, lease_ttl_s=_LEASE_TTL_S)
    await registry.connect(10.0)
    pace = Pace()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(follow_stdin(pace))
        for index, role in enumerate(roles):
            worker = AnsweringWorker(f"{role}-{index}", role, secret.encode(), text, pace)
            tasks.create_task(worker.run(registry))


def main() -> None:
    url, secret, tokens_file, *names = sys.argv[1:]
    roles: list[Role] = [role for role in ("prefill", "decode", "unified") for name in names if name == role]
    uvloop.run(serve(url, secret, json.loads(Path(tokens_file).read_text()), roles))


if __name__ == "__main__":
    main()

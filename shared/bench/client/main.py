"""The client process: `python -m phloem.shared.bench.client.main`, spoken to over the socket
that is its standard input.

It is a process of its own so that drawing progress, making prompts and computing figures never delay the
clock, and so that several of them can share a load that one core can't carry.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

import uvloop

from phloem.shared.bench.client.block import BlockRunner, Counters
from phloem.shared.bench.client.connection import Inbox
from phloem.shared.bench.client.lag import LagMeter, ask_for_priority, forbid_gc_pauses
from phloem.shared.bench.client.requester import Requester
from phloem.shared.bench.protocol import (
    Begin,
    BlockDone,
    ClientDown,
    ClientUp,
    Credit,
    Ready,
    Records,
    SessionBatch,
    Setup,
    StartBlock,
    StopBlocks,
    Tick,
    client_down,
    client_up,
    frame,
    read_frame,
)

_TICK_S = 0.25
_RECORDS_PER_FRAME = 64


class ClientProcess:
    """Runs the blocks that the controller asks for, and sends up what they give."""

    def __init__(self, setup: Setup, up: asyncio.StreamWriter) -> None:
        self._up = up
        self._sending = asyncio.Lock()
        self._lag = LagMeter()
        self._counters = Counters()
        inbox = Inbox(self._lag)
        self._requesters = [
            Requester(index, spec, inbox, timeout_s=setup.timeout_s, keep_pieces=setup.keep_pieces)
            for index, spec in enumerate(setup.targets)
        ]
        self._blocks: dict[int, BlockRunner] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._loads: dict[int, asyncio.Task[None]] = {}  # within the tasks: what an abort cancels

    async def serve(self, down: asyncio.StreamReader) -> None:
        """Until the controller closes its end: then everything in flight is given up."""
        await self._send(Ready())
        background = [
            asyncio.create_task(self._lag.tick_forever()),
            asyncio.create_task(self._tick_forever()),
        ]
        try:
            while (data := await read_frame(down)) is not None:
                self._take(client_down.decode(data))
        finally:
            for task in [*background, *self._tasks.values()]:
                task.cancel()
            await asyncio.gather(*background, *self._tasks.values(), return_exceptions=True)
            for requester in self._requesters:
                requester.close()

    def _take(self, message: ClientDown) -> None:
        match message:
            case StartBlock():
                self._begin(message)
            case Begin():
                self._blocks[message.block].begin(message.start_at)
            case SessionBatch():
                if (runner := self._blocks.get(message.block)) is not None:
                    runner.add(message)
            case StopBlocks():
                self._stop(abort=message.abort)
            case Setup():
                raise AssertionError("Setup comes once")

    def _begin(self, start: StartBlock) -> None:
        async def on_credit() -> None:
            await self._send(Credit(start.block))

        runner = BlockRunner(start, self._requesters[start.target], self._lag, self._counters, on_credit)
        self._blocks[start.block] = runner
        self._tasks[start.block] = asyncio.create_task(self._run(start, runner))

    async def _run(self, start: StartBlock, runner: BlockRunner) -> None:
        if len(self._blocks) == 1:
            self._lag.start()
        load = asyncio.create_task(runner.run())
        self._loads[start.block] = load
        try:
            await asyncio.wait({load})
        finally:
            load.cancel()
        if not load.cancelled():
            load.result()
        del self._blocks[start.block], self._loads[start.block]
        await self._send_records(runner)
        await self._send(BlockDone(start.block, self._lag.samples()))
        self._tasks.pop(start.block, None)

    def _stop(self, *, abort: bool) -> None:
        for block, runner in self._blocks.items():
            runner.stop()
            if abort:
                self._loads[block].cancel()

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            for runner in list(self._blocks.values()):
                await self._send_records(runner)
            counters = self._counters
            await self._send(
                Tick(
                    sent=counters.sent,
                    succeeded=counters.succeeded,
                    failed=counters.failed,
                    in_flight=counters.in_flight,
                    tokens=sum(requester.tally.tokens for requester in self._requesters),
                    lag_ms=self._lag.take_worst() * 1e3,
                )
            )

    async def _send_records(self, runner: BlockRunner) -> None:
        records = runner.take_records()
        for start in range(0, len(records), _RECORDS_PER_FRAME):
            await self._send(Records(records[start : start + _RECORDS_PER_FRAME]))
            await asyncio.sleep(0)

    async def _send(self, message: ClientUp) -> None:
        async with self._sending:
            self._up.write(frame(client_up.encode(message)))
            await self._up.drain()


async def _streams() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The controller's socket pair, which is this process's standard input."""
    return await asyncio.open_connection(sock=socket.socket(fileno=os.dup(0)))


async def _main() -> None:
    down, up = await _streams()
    data = await read_frame(down)
    if data is None:
        return
    setup = client_down.decode(data)
    assert isinstance(setup, Setup)
    await ClientProcess(setup, up).serve(down)


def main() -> None:
    """Returns when the controller has closed its end."""
    ask_for_priority()
    forbid_gc_pauses()
    with contextlib.suppress(ConnectionError), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_main())


if __name__ == "__main__":
    main()

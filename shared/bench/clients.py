"""The client processes, seen from the controller."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import msgspec

from phloem.shared.bench.protocol import (
    Begin,
    BlockDone,
    ClientDown,
    ClientUp,
    Credit,
    LagSamples,
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
from phloem.shared.bench.record import RequestRecord
from phloem.shared.bench.session import Session
from phloem.shared.bench.ticks import TickSum
from phloem.shared.errors import PhloemError
from phloem.shared.lifecycle.child_process import ChildProcess, spawn_child

# How far ahead of the load sessions are sent to a client: enough never to run dry, little enough to hold.
_BATCH_SESSIONS = 64
_BATCH_BYTES = 1 << 20
_BATCHES_AHEAD = 16
# Between the order to begin and the beginning: the first batches are there by then.
_LEAD_S = 0.1
_STOP_GRACE_S = 5.0

OnTick = Callable[[Tick], None]


class BlockResult(NamedTuple):
    """What a block gave. `duration_s` is from its start to the last event of its last request."""

    started_s: float
    duration_s: float
    records: list[RequestRecord]
    lag: list[LagSamples]


class ClientGroup:
    """Client processes that share every load between them. An async context manager.

    Raises `PhloemError` (`bench_client_died`) from `run_block` when one of them ends before its time.
    """

    def __init__(self, setup: Setup, num_clients: int, on_tick: OnTick) -> None:
        self._setup = setup
        self._num_clients = num_clients
        self._ticks = TickSum(num_clients, on_tick)
        self._clients: list[_Client] = []

    async def __aenter__(self) -> ClientGroup:
        for index in range(self._num_clients):
            self._clients.append(await _Client.spawn(index, partial(self._ticks.take, index)))
        for client in self._clients:
            await client.set_up(self._setup)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(client.close() for client in self._clients), return_exceptions=True)

    async def run_block(self, start: StartBlock, sessions: Iterator[Session]) -> BlockResult:
        """Runs one block to its end, `sessions` shared out in turn. Raises the first client's error."""
        feed = _Feed(sessions, self._num_clients)
        for client in self._clients:
            await client.prepare(_share(start, client.index, self._num_clients), feed)
        start_at = time.monotonic() + _LEAD_S
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(client.run_block(Begin(start.block, start_at), feed))
                    for client in self._clients
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        records = [record for task in tasks for record in task.result()[0]]
        ended_s = max((record.ended_s for record in records), default=start_at)
        lag = [task.result()[1] for task in tasks]
        return BlockResult(start_at, max(ended_s - start_at, 1e-9), records, lag)

    def stop(self, *, abort: bool = False) -> None:
        """Begins nothing new; with `abort`, what is in flight is given up."""
        for client in self._clients:
            client.stop(StopBlocks(abort))


class _Feed:
    """Deals the sessions out: each client gets every n-th, in order."""

    def __init__(self, sessions: Iterator[Session], num_clients: int) -> None:
        self._sessions = sessions
        self._dealt: list[list[Session]] = [[] for _ in range(num_clients)]
        self._next_client = 0
        self._is_dry = False

    def take_batch(self, index: int) -> tuple[list[Session], bool]:
        """The client's next sessions, and whether they are its last."""
        batch: list[Session] = []
        size = 0
        while len(batch) < _BATCH_SESSIONS and size < _BATCH_BYTES:
            session = self._take(index)
            if session is None:
                return batch, True
            batch.append(session)
            size += session.num_bytes
        return batch, False

    def _take(self, index: int) -> Session | None:
        dealt = self._dealt[index]
        while not dealt and not self._is_dry:
            session = next(self._sessions, None)
            if session is None:
                self._is_dry = True
                break
            self._dealt[self._next_client].append(session)
            self._next_client = (self._next_client + 1) % len(self._dealt)
        return dealt.pop(0) if dealt else None


class _Client:
    """One client process."""

    def __init__(
        self,
        index: int,
        child: ChildProcess,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        on_tick: OnTick,
    ) -> None:
        self.index = index
        self._child = child
        up, self._down = streams
        self._on_tick = on_tick
        # Unbounded, but a client sends one credit per batch, and one `BlockDone`.
        self._events: asyncio.Queue[Ready | Credit | BlockDone | None] = asyncio.Queue()
        self._is_fed = False
        self._records: list[RequestRecord] = []
        self._reading = asyncio.create_task(self._read(up))

    @classmethod
    async def spawn(cls, index: int, on_tick: OnTick) -> _Client:
        argv = [sys.executable, "-m", "phloem.shared.bench.client.main"]
        ours, theirs = socket.socketpair()
        with theirs:
            child = await spawn_child(f"bench-client-{index}", argv, stdin=theirs.fileno())
        return cls(index, child, await asyncio.open_connection(sock=ours), on_tick)

    async def send(self, message: ClientDown) -> None:
        try:
            self._down.write(frame(client_down.encode(message)))
            await self._down.drain()
        except ConnectionError as error:
            raise self._died() from error

    async def set_up(self, setup: Setup) -> None:
        """Returns once the process is ready."""
        await self.send(setup)
        if await self._events.get() is None:
            raise self._died()

    async def prepare(self, start: StartBlock, feed: _Feed) -> None:
        """Opens a block and sends its first sessions."""
        self._records, self._is_fed = [], False
        await self.send(start)
        for _ in range(_BATCHES_AHEAD):
            await self._feed(start.block, feed)

    async def run_block(self, begin: Begin, feed: _Feed) -> tuple[list[RequestRecord], LagSamples]:
        """Begins the prepared block and feeds it to its end. Raises `PhloemError` when the client dies."""
        await self.send(begin)
        while True:
            match await self._events.get():
                case BlockDone(lag=lag):
                    return self._records, lag
                case None:
                    raise self._died()
                case _:
                    await self._feed(begin.block, feed)

    def stop(self, message: StopBlocks) -> None:
        """A few bytes, which need no draining."""
        self._down.write(frame(client_down.encode(message)))

    async def close(self) -> None:
        """Ends the process."""
        self._down.close()
        await self._child.stop(_STOP_GRACE_S)
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _feed(self, block: int, feed: _Feed) -> None:
        if not self._is_fed:
            sessions, self._is_fed = feed.take_batch(self.index)
            await self.send(SessionBatch(block, sessions, self._is_fed))

    async def _read(self, up: asyncio.StreamReader) -> None:
        try:
            while (data := await read_frame(up)) is not None:
                self._take(client_up.decode(data))
        finally:
            self._events.put_nowait(None)

    def _take(self, message: ClientUp) -> None:
        match message:
            case Tick():
                self._on_tick(message)
            case Records():
                self._records.extend(message.records)
            case Ready() | Credit() | BlockDone():
                self._events.put_nowait(message)

    def _died(self) -> PhloemError:
        code = self._child.returncode
        return PhloemError("bench_client_died", f"client process {self.index} ended early (exit code {code})")


def _share(start: StartBlock, index: int, num_clients: int) -> StartBlock:
    """This client's share of the places; a client without one gets no part of a closed loop."""
    return msgspec.structs.replace(
        start,
        concurrency=_part(start.concurrency, index, num_clients),
        initial_concurrency=_part(start.initial_concurrency, index, num_clients),
    )


def _part(total: int, index: int, num_clients: int) -> int:
    return total // num_clients + (index < total % num_clients)

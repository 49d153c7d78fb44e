"""The index publisher against an index that loses, refuses and forgets: real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from phloem.shared.errors import PhloemError
from phloem.shared.protocol.index import (
    INDEX_SERVICE,
    Attach,
    Attached,
    Publish,
    Published,
    attach,
    attached,
    publish,
    published,
)
from phloem.shared.protocol.session import PeerRef
from phloem.shared.rpc.server import RpcServer
from phloem.shared.worker.index_publisher import IndexPublisher
from phloem.shared.worker.metrics import WorkerMetrics
from tests.support.waiting import until

ME = PeerRef("w1", 7)
SECRET = b"secret"


def block(number: int) -> bytes:
    return number.to_bytes(16, "big")


class FakeIndex:
    """Keeps per slot what was published, in order; `refuse` makes the next Publish fail."""

    def __init__(self) -> None:
        self.slots: list[set[bytes]] = []
        self.seqs: list[int] = []
        self.refuse: PhloemError | None = None
        self.address = ""

    @property
    def blocks(self) -> set[bytes]:
        """What the newest slot holds."""
        return self.slots[-1] if self.slots else set()

    async def on_attach(self, message: Attach) -> Attached:
        assert message.worker == ME
        self.slots.append(set())
        self.seqs.append(0)
        return Attached(len(self.slots) - 1)

    async def on_publish(self, message: Publish) -> Published:
        if self.refuse is not None:
            error, self.refuse = self.refuse, None
            raise error
        assert message.worker == ME
        assert message.seq == self.seqs[message.slot] + 1
        assert not set(message.stored) & set(message.removed)
        self.seqs[message.slot] = message.seq
        self.slots[message.slot] -= set(message.removed)
        self.slots[message.slot] |= set(message.stored)
        return Published(message.seq)


@asynccontextmanager
async def running_index() -> AsyncIterator[FakeIndex]:
    index = FakeIndex()
    server = RpcServer(SECRET)
    server.add_unary(INDEX_SERVICE, "Attach", attach, attached, index.on_attach)
    server.add_unary(INDEX_SERVICE, "Publish", publish, published, index.on_publish)
    index.address = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
    yield index
    await server.stop(0)


class Worker:
    """A tree and its publisher; a dump is answered at once, as the engine does between two steps."""

    def __init__(self) -> None:
        self.tree: set[bytes] = set()
        self.num_dumps = 0
        self.publisher = IndexPublisher(ME, SECRET, self._dump, WorkerMetrics(CollectorRegistry()))

    def _dump(self) -> None:
        self.num_dumps += 1
        self.publisher.on_tree_dump(list(self.tree))

    def store(self, *numbers: int) -> None:
        self.tree |= {block(n) for n in numbers}
        self.publisher.note([block(n) for n in numbers], [])

    def remove(self, *numbers: int) -> None:
        self.tree -= {block(n) for n in numbers}
        self.publisher.note([], [block(n) for n in numbers])


@asynccontextmanager
async def publishing() -> AsyncIterator[Worker]:
    worker = Worker()
    task = asyncio.create_task(worker.publisher.run())
    yield worker
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_tree_is_published_and_then_every_change() -> None:
    async with running_index() as index, publishing() as worker:
        worker.store(1, 2)  # before there is an index
        worker.publisher.set_addresses([index.address])
        await until(lambda: index.blocks == {block(1), block(2)})
        worker.store(3)
        worker.remove(1)
        await until(lambda: index.blocks == worker.tree)
        assert worker.num_dumps == 1


async def test_large_tree_goes_in_several_messages() -> None:
    async with running_index() as index, publishing() as worker:
        worker.tree = {block(n) for n in range(10_000)}
        worker.publisher.set_addresses([index.address])
        await until(lambda: index.blocks == worker.tree)
        assert index.seqs == [3]


async def test_refused_publish_attaches_anew_and_publishes_everything() -> None:
    async with running_index() as index, publishing() as worker:
        worker.store(1)
        worker.publisher.set_addresses([index.address])
        await until(lambda: index.blocks == worker.tree)
        index.refuse = PhloemError("resync_needed", "gap", retryable=True, http_status=409)
        worker.store(2)
        await until(lambda: len(index.slots) == 2 and index.blocks == worker.tree)


async def test_resync_publishes_everything_without_a_new_change() -> None:
    async with running_index() as index, publishing() as worker:
        worker.store(1)
        worker.publisher.set_addresses([index.address])
        await until(lambda: index.blocks == worker.tree)
        worker.publisher.resync()
        await until(lambda: len(index.slots) == 2 and index.blocks == worker.tree)


async def test_lost_replica_is_replaced_by_another() -> None:
    async with running_index() as second, publishing() as worker:
        async with running_index() as first:
            worker.store(1)
            worker.publisher.set_addresses([first.address])
            await until(lambda: first.blocks == worker.tree)
        worker.publisher.set_addresses([second.address])
        worker.store(2)
        await until(lambda: second.blocks == worker.tree)


async def test_overflow_is_repaired_by_the_whole_tree() -> None:
    async with running_index() as index, publishing() as worker:
        worker.publisher.set_addresses([index.address])
        await until(lambda: len(index.slots) == 1)
        worker.store(*range(70_000))
        await until(lambda: len(index.slots) == 2 and index.blocks == worker.tree)

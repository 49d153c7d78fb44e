"""The index publisher against an index that loses, refuses and forgets: real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry

from phloem.shared.errors import PhloemError, unavailable
from phloem.shared.protocol.index import (
    INDEX_SERVICE,
    Attach,
    Attached,
    Publish,
    Published,
    Verified,
    Verify,
    attach,
    attached,
    publish,
    published,
    verified,
    verify,
)
from phloem.shared.protocol.session import PeerRef
from phloem.shared.rpc.server import RpcServer
from phloem.shared.tree_digest import TreeDigest
from phloem.shared.worker.index_publisher import IndexPublisher
from phloem.shared.worker.metrics import WorkerMetrics
from tests.support.waiting import until

RESYNC_NEEDED = PhloemError("resync_needed", "gap", retryable=True, http_status=409)
ME = PeerRef("w1", 7)
SECRET = b"secret"


def block(number: int) -> bytes:
    return number.to_bytes(16, "big")


class FakeIndex:
    """Keeps per slot what was published, in order; replicas of one index share it. `refuse` makes the next
    Publish fail before it is applied, `lose_answer` after that."""

    def __init__(self) -> None:
        self.slots: list[set[bytes]] = []
        self.seqs: list[int] = []
        self.refuse: PhloemError | None = None
        self.lose_answer = False
        self.cannot_verify = False
        self.num_verified = 0
        self.sampled: set[bytes] = set()

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
        assert message.seq in (self.seqs[message.slot], self.seqs[message.slot] + 1)
        assert not set(message.stored) & set(message.removed)
        self.seqs[message.slot] = message.seq
        self.slots[message.slot] -= set(message.removed)
        self.slots[message.slot] |= set(message.stored)
        if self.lose_answer:
            self.lose_answer = False
            raise unavailable("gone", code="peer_unavailable")
        return Published(message.seq)

    async def on_verify(self, message: Verify) -> Verified:
        if self.cannot_verify:
            raise unavailable("an older version, say", code="peer_unavailable")
        digest = TreeDigest()
        for held in self.slots[message.slot]:
            digest.add(held)
        if message.seq != self.seqs[message.slot] or not set(message.sample) <= self.slots[message.slot]:
            raise RESYNC_NEEDED
        if (message.num_blocks, message.digest) != (digest.num_blocks, digest.value):
            raise RESYNC_NEEDED
        self.num_verified += 1
        self.sampled |= set(message.sample)
        return Verified(message.seq)

    @asynccontextmanager
    async def replica(self) -> AsyncIterator[str]:
        """A replica's address."""
        server = RpcServer(SECRET)
        server.add_unary(INDEX_SERVICE, "Attach", attach, attached, self.on_attach)
        server.add_unary(INDEX_SERVICE, "Publish", publish, published, self.on_publish)
        server.add_unary(INDEX_SERVICE, "Verify", verify, verified, self.on_verify)
        port = await server.start("127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(0)


class Worker:
    """A tree and its publisher; a dump is answered at once, as the engine does between two steps."""

    def __init__(self, verify_interval_s: float) -> None:
        self.tree: set[bytes] = set()
        self.num_dumps = 0
        self.prometheus = CollectorRegistry()
        self.publisher = IndexPublisher(
            ME, SECRET, self._dump, WorkerMetrics(self.prometheus), verify_interval_s=verify_interval_s
        )

    def digests(self, result: str) -> float:
        labels = {"result": result}
        return self.prometheus.get_sample_value("phloem_index_digests_total", labels) or 0.0

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
async def publishing(verify_interval_s: float = 60.0) -> AsyncIterator[Worker]:
    worker = Worker(verify_interval_s)
    task = asyncio.create_task(worker.publisher.run())
    try:
        yield worker
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def index() -> FakeIndex:
    return FakeIndex()


@pytest.fixture
async def address(index: FakeIndex) -> AsyncIterator[str]:
    async with index.replica() as address:
        yield address


async def test_tree_is_published_and_then_every_change(index: FakeIndex, address: str) -> None:
    async with publishing() as worker:
        worker.store(1, 2)  # before there is an index
        worker.publisher.set_addresses([address])
        await until(lambda: index.blocks == {block(1), block(2)})
        worker.store(3)
        worker.remove(1)
        await until(lambda: index.blocks == worker.tree)
        assert worker.num_dumps == 1


async def test_large_tree_goes_in_several_messages(index: FakeIndex, address: str) -> None:
    async with publishing() as worker:
        worker.tree = {block(n) for n in range(10_000)}
        worker.publisher.set_addresses([address])
        await until(lambda: index.blocks == worker.tree)
        assert index.seqs == [3]


async def test_refused_publish_attaches_anew_and_publishes_everything(index: FakeIndex, address: str) -> None:
    async with publishing() as worker:
        worker.store(1)
        worker.publisher.set_addresses([address])
        await until(lambda: index.blocks == worker.tree)
        index.refuse = RESYNC_NEEDED
        worker.store(2)
        await until(lambda: len(index.slots) == 2 and index.blocks == worker.tree)


async def test_resync_publishes_everything_without_a_new_change(index: FakeIndex, address: str) -> None:
    async with publishing() as worker:
        worker.store(1)
        worker.publisher.set_addresses([address])
        await until(lambda: index.blocks == worker.tree)
        worker.publisher.resync()
        await until(lambda: len(index.slots) == 2 and index.blocks == worker.tree)


async def test_another_replica_goes_on_where_the_lost_one_stopped(index: FakeIndex) -> None:
    async with index.replica() as second, publishing() as worker:
        async with index.replica() as first:
            worker.store(1)
            worker.publisher.set_addresses([first])
            await until(lambda: index.blocks == worker.tree)
        worker.store(2)  # to nobody
        worker.publisher.set_addresses([second])
        worker.store(3)
        await until(lambda: index.blocks == worker.tree)
        assert (len(index.slots), worker.num_dumps) == (1, 1)


async def test_message_whose_answer_was_lost_is_sent_again_as_it_was(index: FakeIndex, address: str) -> None:
    async with publishing() as worker:
        worker.store(1)
        worker.publisher.set_addresses([address])
        await until(lambda: index.blocks == worker.tree)
        index.lose_answer = True
        worker.store(2)
        await until(lambda: not index.lose_answer)
        worker.remove(2)
        worker.store(3)
        await until(lambda: index.blocks == worker.tree)
        assert index.seqs == [3]


async def test_overflow_is_repaired_by_the_whole_tree(index: FakeIndex, address: str) -> None:
    async with publishing() as worker:
        worker.tree = {block(80_000)}
        worker.publisher.set_addresses([address])
        await until(lambda: index.blocks == worker.tree)  # what comes before the first dump is in that
        worker.store(*range(70_000))
        await until(lambda: len(index.slots) == 2 and index.blocks == worker.tree)


async def test_equal_digests_change_nothing_and_every_block_is_sampled(
    index: FakeIndex, address: str
) -> None:
    async with publishing(verify_interval_s=0.01) as worker:
        worker.tree = {block(n) for n in range(2_000)}
        worker.publisher.set_addresses([address])
        await until(lambda: index.sampled == worker.tree)
        worker.remove(1, 2, 3)
        worker.store(5_000)
        verified = index.num_verified
        await until(lambda: index.num_verified > verified + 1 and index.blocks == worker.tree)
        assert len(index.slots) == 1
        assert worker.digests("different") == 0


@pytest.mark.parametrize("damage", [set.pop, lambda blocks: blocks.add(block(77_777))])
async def test_index_that_holds_anything_else_is_repaired(
    index: FakeIndex, address: str, damage: Callable[[set[bytes]], object]
) -> None:
    async with publishing(verify_interval_s=0.01) as worker:
        worker.store(*range(100))
        worker.publisher.set_addresses([address])
        await until(lambda: index.num_verified > 0)
        damage(index.blocks)
        await until(lambda: len(index.slots) == 2 and index.blocks == worker.tree)
        assert worker.digests("different") == 1


async def test_index_that_cannot_compare_digests_is_told_of_changes_all_the_same(
    index: FakeIndex, address: str
) -> None:
    index.cannot_verify = True
    async with publishing(verify_interval_s=0.2) as worker:
        worker.publisher.set_addresses([address])
        for number in range(5):
            worker.store(number)
            await until(lambda: index.blocks == worker.tree)
        await until(lambda: worker.digests("failed") >= 2)
        worker.store(100)
        await until(lambda: index.blocks == worker.tree)
        assert len(index.slots) == 1


async def test_digests_are_compared_while_changes_never_stop(index: FakeIndex, address: str) -> None:
    async with publishing(verify_interval_s=0.05) as worker:
        worker.publisher.set_addresses([address])
        number = 0

        def verified_while_storing() -> bool:
            nonlocal number
            worker.store(*range(number, number + 100))
            number += 100
            return index.num_verified >= 3

        await until(verified_while_storing)
        assert len(index.slots) == 1


async def test_dump_that_comes_twice_does_not_undo_a_removal(index: FakeIndex, address: str) -> None:
    async with publishing() as worker:
        worker.store(1, 2)
        worker.publisher.set_addresses([address])
        await until(lambda: index.blocks == worker.tree)
        worker.remove(1)
        worker.publisher.on_tree_dump([block(2)])  # asked for by an attempt that was given up
        await until(lambda: index.blocks == {block(2)})

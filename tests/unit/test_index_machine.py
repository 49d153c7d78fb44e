"""The index as a state machine: workers attach, publish, restart, die and come back while replicas sweep.

The model is the union of the workers' trees. Against a real Valkey; after every step one of two replicas must
name exactly the live workers and exactly how much each holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from phloem.services.cache_index import layout
from phloem.shared.discovery import keys
from phloem.shared.discovery.registry import Registry
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.index import Attach, Publish, Verify
from phloem.shared.protocol.session import PeerRef
from phloem.shared.tree_digest import TreeDigest
from tests.support.index_replica import IndexReplica, some_hash
from tests.support.valkey import ValkeyServer
from tests.support.worker_records import record_of

T = TypeVar("T")

NUM_CHAINS = 3
CHAIN_BLOCKS = 40
MAX_SLOTS = 6  # fewer than the workers can use up, so that the index is full now and then
WORKERS = ("a", "b", "c", "d")

# Chains 0 and 1 part after 20 blocks, chain 2 is alone.
CHAINS = [
    [some_hash(0 if chain < 2 and index < 20 else chain, index) for index in range(CHAIN_BLOCKS)]
    for chain in range(NUM_CHAINS)
]
CHAIN = st.integers(0, NUM_CHAINS - 1)
LENGTH = st.integers(0, CHAIN_BLOCKS)
WORKER = st.sampled_from(WORKERS)
REPLICA = st.integers(0, 1)


class Worker:
    """What one worker process at one epoch knows: its tree, and how far it told the index."""

    def __init__(self, ref: PeerRef) -> None:
        self.ref = ref
        self.tree: set[bytes] = set()
        self.slot: int | None = None  # None: must attach and publish everything
        self.seq = 0

    def held(self, chain: list[bytes]) -> int:
        return next((i for i, block in enumerate(chain) if block not in self.tree), len(chain))


class IndexMachine(RuleBasedStateMachine):
    def __init__(self, url: str) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.registry = Registry(url, timeout_s=10.0, lease_ttl_s=3600.0)
        self.replicas = [IndexReplica(url, max_slots=MAX_SLOTS) for _ in range(2)]
        self.live: dict[str, Worker] = {}
        self.gone: list[Worker] = []  # killed or replaced; as zombies they may still speak
        self.turn = 0
        self.do(self.registry.link.command("FLUSHALL"))

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def teardown(self) -> None:
        try:
            self.do(self._settle_and_check())
        finally:
            for closing in (self.registry.close(), *(replica.close() for replica in self.replicas)):
                self.do(closing)
            self.runner.close()

    # What workers do

    @rule(name=WORKER, chain=CHAIN, length=LENGTH)
    def start(self, name: str, chain: int, length: int) -> None:
        """A first start, or a restart under a new epoch."""
        if name in self.live:
            self.gone.append(self.live.pop(name))
        worker = Worker(PeerRef(name, self.do(self.registry.next_epoch())))
        worker.tree = set(CHAINS[chain][:length])
        self.do(self.registry.renew_worker(record_of(worker.ref)))
        self.live[name] = worker
        self.do(self._resync(worker, 0))

    @rule(name=WORKER, chain=CHAIN, keep=LENGTH, store=CHAIN, length=LENGTH, replica=REPLICA)
    def change(self, name: str, chain: int, keep: int, store: int, length: int, replica: int) -> None:
        """One engine step: evicts the end of one chain, stores another."""
        if name in self.live:
            self.do(self._change(self.live[name], chain, keep, store, length, replica))

    @rule(name=WORKER, replica=REPLICA)
    def skip_a_message(self, name: str, replica: int) -> None:
        worker = self.live.get(name)
        if worker is not None and worker.slot is not None:
            worker.seq += 1
            self.do(self._expect_resync(worker, replica))
            self.do(self._resync(worker, replica))

    @rule(name=WORKER, replica=REPLICA)
    def resync_without_need(self, name: str, replica: int) -> None:
        if name in self.live:
            self.do(self._resync(self.live[name], replica))

    @rule(name=WORKER)
    def die(self, name: str) -> None:
        """kill -9, and the lease ran out."""
        if name in self.live:
            self.gone.append(self.live.pop(name))
            self.do(self.registry.link.command("DEL", keys.lease(keys.worker_member(name))))

    @precondition(lambda self: self.gone)
    @rule(data=st.data(), replica=REPLICA)
    def zombie_speaks(self, data: st.DataObject, replica: int) -> None:
        """A process that was taken for dead goes on publishing; it must not disturb its successors."""
        zombie = data.draw(st.sampled_from(self.gone))
        if zombie.slot is not None:
            try:
                self.do(self._publish(zombie, sorted(CHAINS[2]), [], replica))
                zombie.tree |= set(CHAINS[2])
            except PhloemError as error:
                assert error.code == "resync_needed"

    @precondition(lambda self: self.gone)
    @rule(data=st.data(), replica=REPLICA)
    def zombie_comes_back(self, data: st.DataObject, replica: int) -> None:
        """It stalled and registers again at its old epoch, which works unless it was replaced."""
        zombie = data.draw(st.sampled_from(self.gone))
        name = zombie.ref.worker_id
        try:
            self.do(self.registry.renew_worker(record_of(zombie.ref)))
        except PhloemError as error:
            assert error.code == "stale_epoch"
            self.do(self._expect_stale_attach(zombie, replica))
            return
        assert name not in self.live
        self.gone.remove(zombie)
        self.live[name] = zombie
        self.do(self._resync(zombie, replica))

    @rule(name=WORKER, replica=REPLICA)
    def compare_digests(self, name: str, replica: int) -> None:
        """While nothing was lost they are equal."""
        worker = self.live.get(name)
        if worker is not None and worker.slot is not None:
            self.do(self._verify(worker, replica))

    # What happens to the index

    @rule(name=WORKER, data=st.data(), replica=REPLICA)
    def lose_a_block(self, name: str, data: st.DataObject, replica: int) -> None:
        """Redis drops one key by itself; its holders learn of it by their next digest."""
        if name in self.live and self.live[name].tree:
            block = data.draw(st.sampled_from(sorted(self.live[name].tree)))
            self.do(self._lose_a_block(block, replica))

    @rule(replica=REPLICA)
    def sweep(self, replica: int) -> None:
        self.do(self._sweep(replica))

    @rule(replica=REPLICA)
    def lose_all_data(self, replica: int) -> None:
        self.do(self._lose_all_data(replica))

    # What must hold

    @invariant()
    def live_workers_are_named_with_exactly_what_they_hold(self) -> None:
        self.turn += 1
        self.do(self._check_matches(self.replicas[self.turn % 2]))

    @invariant()
    def every_slot_has_one_state_and_every_worker_one_slot(self) -> None:
        self.do(self._check_slots())

    async def _check_matches(self, replica: IndexReplica) -> None:
        await replica.observe_registry(self.registry)
        for chain in CHAINS:
            expected = {w.ref: w.held(chain) for w in self.live.values() if w.slot is not None}
            assert await replica.lengths(chain) == {ref: k for ref, k in expected.items() if k > 0}

    async def _check_slots(self) -> None:
        link = self.registry.link
        table = await self.replicas[0].slots.table()
        retired = list(await self.replicas[0].slots.retired())
        free = [int(slot) for slot in await link.command("ZRANGE", layout.FREE, 0, -1)]
        high = int(await link.command("GET", layout.HIGH) or 0)
        assert sorted([*table.workers, *retired, *free]) == list(range(high))
        assert high <= MAX_SLOTS
        names = [ref.worker_id for ref in table.workers.values()]
        assert len(names) == len(set(names))
        for worker in self.live.values():
            assert worker.slot is None or table.workers[worker.slot] == worker.ref

    async def _settle_and_check(self) -> None:
        """After two sweeps nothing is left in Redis but the live workers' trees."""
        await self._sweep(0)
        for worker in self.live.values():
            if worker.slot is None:
                await self._resync(worker, 0)
            assert worker.slot is not None
        await self._sweep(1)
        blocks: dict[bytes, int] = {}
        for worker in self.live.values():
            assert worker.slot is not None
            for block in worker.tree:
                blocks[layout.block_key(block)] = blocks.get(layout.block_key(block), 0) | 1 << worker.slot
        assert await self._all_blocks() == blocks

    async def _all_blocks(self) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        cursor = 0
        while True:
            batch = await self.replicas[0].store.scan(cursor)
            found |= batch.bitmaps
            cursor = batch.cursor
            if cursor == 0:
                return found

    # How

    async def _change(
        self, worker: Worker, chain: int, keep: int, store: int, length: int, replica: int
    ) -> None:
        doomed = set(CHAINS[chain][keep:])
        if chain < 2 and keep < 20:  # the other chain hangs below the blocks that go
            doomed |= set(CHAINS[1 - chain][keep:])
        removed = [b for c in CHAINS for b in reversed(c) if b in doomed and b in worker.tree]
        removed = list(dict.fromkeys(removed))
        after = worker.tree - set(removed)
        stored = [block for block in CHAINS[store][:length] if block not in after]
        both = set(stored) & set(removed)  # evicted and computed again within the step: no change
        worker.tree = after | set(stored)
        if worker.slot is None:
            await self._resync(worker, replica)
            return
        stored = [block for block in stored if block not in both]
        removed = [block for block in removed if block not in both]
        await self._publish(worker, stored, removed, replica)
        worker.seq -= 1
        await self._publish(worker, stored, removed, replica)  # sent again: applied once

    async def _publish(self, worker: Worker, stored: list[bytes], removed: list[bytes], replica: int) -> None:
        assert worker.slot is not None
        message = Publish(
            worker=worker.ref, slot=worker.slot, seq=worker.seq + 1, stored=stored, removed=removed
        )
        await self.replicas[replica].service.on_publish(message)
        worker.seq += 1

    async def _verify(self, worker: Worker, replica: int) -> None:
        assert worker.slot is not None
        digest = TreeDigest()
        for block in worker.tree:
            digest.add(block)
        await self.replicas[replica].service.on_verify(
            Verify(
                worker=worker.ref,
                slot=worker.slot,
                seq=worker.seq,
                num_blocks=digest.num_blocks,
                digest=digest.value,
                sample=sorted(worker.tree),
            )
        )

    async def _lose_a_block(self, block: bytes, replica: int) -> None:
        await self.registry.link.command("DEL", layout.block_key(block))
        for worker in self.live.values():
            if block in worker.tree and worker.slot is not None:
                try:
                    await self._verify(worker, replica)
                except PhloemError as error:
                    assert error.code == "resync_needed"
                else:
                    raise AssertionError("a lost block went unnoticed")
                await self._resync(worker, replica)

    async def _resync(self, worker: Worker, replica: int) -> None:
        worker.slot, worker.seq = None, 0
        try:
            attached = await self.replicas[replica].service.on_attach(Attach(worker.ref))
        except PhloemError as error:
            assert error.code == "index_full"
            return
        worker.slot = attached.slot
        tree = [block for chain in CHAINS for block in chain if block in worker.tree]
        await self._publish(worker, tree, [], replica)

    async def _expect_resync(self, worker: Worker, replica: int) -> None:
        try:
            await self._publish(worker, [], sorted(worker.tree), replica)
        except PhloemError as error:
            assert error.code == "resync_needed"
            assert error.retryable
        else:
            raise AssertionError("a message out of order was taken")

    async def _expect_stale_attach(self, worker: Worker, replica: int) -> None:
        try:
            await self.replicas[replica].service.on_attach(Attach(worker.ref))
        except PhloemError as error:
            assert error.code == "stale_epoch"
        else:
            raise AssertionError("a replaced worker got a slot")

    async def _sweep(self, replica: int) -> None:
        await self.replicas[replica].observe_registry(self.registry)
        await self.replicas[replica].sweeper.sweep()

    async def _lose_all_data(self, replica: int) -> None:
        await self.registry.link.command("FLUSHALL")
        for worker in self.live.values():
            await self.registry.renew_worker(record_of(worker.ref))
            if worker.slot is not None:
                await self._expect_resync(worker, replica)
            worker.slot = None
        self.gone.clear()  # nobody is left who knows that they were replaced


def test_index_equals_the_union_of_live_trees(valkey: ValkeyServer) -> None:
    class Machine(IndexMachine):
        def __init__(self) -> None:
            super().__init__(valkey.url)

    few_but_long = settings(max_examples=40, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(Machine, settings=few_but_long)

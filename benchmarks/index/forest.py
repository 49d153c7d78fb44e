"""Workers with real radix trees, leases and index publishers, and what the index must hold then."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from benchmarks.index.world import SECRET
from phloem.services.cache_index import layout
from phloem.services.cache_index.slots import Slots
from phloem.services.cache_index.store import BlockStore
from phloem.services.gateway.cluster.index_client import IndexClient
from phloem.shared.block_hash import BLOCK_TOKENS, BlockHasher
from phloem.shared.discovery.lease import LeaseKeeper, WorkerLease
from phloem.shared.discovery.registry import Registry
from phloem.shared.engine.radix_tree import RadixTree
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import PeerRef
from phloem.shared.worker.index_publisher import IndexPublisher
from phloem.shared.worker.metrics import WorkerMetrics
from tests.support.worker_records import record_of

PAGE_SIZE = 16
NUM_SYSTEM_PROMPTS = 4
MAX_PROMPT_BLOCKS = 40
MAX_TREE_PAGES = 2_000


class Prompts:
    """Conversations that share system prompts; token ids and block hashes of each."""

    def __init__(self, rng: random.Random, count: int) -> None:
        hasher = BlockHasher(SECRET)
        systems = [_tokens(rng, rng.randint(1, 8) * BLOCK_TOKENS - 7) for _ in range(NUM_SYSTEM_PROMPTS)]
        self.tokens: list[list[int]] = []
        self.hashes: list[list[bytes]] = []
        for _ in range(count):
            tokens = rng.choice(systems) + _tokens(rng, MAX_PROMPT_BLOCKS * BLOCK_TOKENS)
            self.tokens.append(tokens[: MAX_PROMPT_BLOCKS * BLOCK_TOKENS])
            self.hashes.append(hasher.chain(self.tokens[-1]))


class TreeWorker:
    """One worker process at one epoch, without its engine: `change` stands for a step."""

    def __init__(self, ref: PeerRef, redis_url: str, prompts: Prompts, rng: random.Random) -> None:
        self.ref = ref
        self._registry = Registry(redis_url)
        self._prompts = prompts
        self._rng = rng
        self._tree = RadixTree(PAGE_SIZE)
        self._next_page = 0
        self.prometheus = CollectorRegistry()
        self.publisher = IndexPublisher(ref, SECRET, self._dump, WorkerMetrics(self.prometheus))

    async def run(self) -> None:
        """Lives until cancelled: then its lease runs out, as after a kill."""
        lease = WorkerLease(self._registry, lambda: record_of(self.ref))
        keeper = LeaseKeeper(lease, on_regained=self.publisher.resync)
        try:
            await keeper.acquire()
            async with asyncio.TaskGroup() as tasks:
                for job in (keeper.run(), self.publisher.run(), self._follow_cluster()):
                    tasks.create_task(job)
        finally:
            await self._registry.close()

    def change(self) -> None:
        """Stores a part of some prompt, or evicts some pages."""
        if self._tree.num_pages > self._rng.randint(MAX_TREE_PAGES // 2, MAX_TREE_PAGES):
            self._tree.evict(self._rng.randint(1, 160))
        else:
            self._store(self._rng.randrange(len(self._prompts.tokens)))
        events = self._tree.take_events()
        self.publisher.note(events.stored, events.removed)

    def blocks(self) -> set[bytes]:
        return set(self._tree.block_hashes())

    def _store(self, prompt: int) -> None:
        num_pages = self._rng.randint(1, len(self._prompts.tokens[prompt]) // PAGE_SIZE)
        page_ids = range(self._next_page, self._next_page + num_pages)
        self._next_page += num_pages
        tokens = self._prompts.tokens[prompt][: num_pages * PAGE_SIZE]
        self._tree.insert(tokens, page_ids, "", self._prompts.hashes[prompt])

    def _dump(self) -> None:
        self.publisher.on_tree_dump(self._tree.block_hashes())

    async def _follow_cluster(self) -> None:
        async for snapshot in self._registry.watch():
            self.publisher.set_addresses([s.address for s in snapshot.services if s.kind == "cache_index"])


class Forest:
    """The living workers, and what Redis holds of them."""

    def __init__(self, redis_url: str, prompts: Prompts, rng: random.Random) -> None:
        self.registry = Registry(redis_url)
        self.workers: list[TreeWorker] = []
        self.prompts = prompts
        self._redis_url = redis_url
        self._rng = rng
        self._tasks: dict[PeerRef, asyncio.Task[None]] = {}
        self._store = BlockStore(self.registry.link, read_timeout_s=5.0, write_timeout_s=5.0)
        self._slots = Slots(self.registry.link, 4096)

    async def start_worker(self, name: str) -> TreeWorker:
        """Under a new epoch, with an empty tree; one of that name that lives is killed."""
        for worker in [old for old in self.workers if old.ref.worker_id == name]:
            await self._kill(worker)
        ref = PeerRef(name, await self.registry.next_epoch())
        worker = TreeWorker(ref, self._redis_url, self.prompts, random.Random(self._rng.random()))
        self.workers.append(worker)
        self._tasks[ref] = asyncio.create_task(worker.run(), name=name)
        return worker

    async def close(self) -> None:
        for worker in list(self.workers):
            await self._kill(worker)
        await self.registry.close()

    async def stored(self) -> dict[PeerRef, set[bytes]]:
        """What Redis holds, by the slots' workers; bits of slots that are being cleared don't count, those of
        no slot at all are under `PeerRef("", 0)`."""
        table = await self._slots.table()
        retired = set(await self._slots.retired())
        found: dict[PeerRef, set[bytes]] = {worker: set() for worker in table.workers.values()}
        cursor, more = 0, True
        while more:
            batch = await self._store.scan(cursor)
            cursor, more = batch.cursor, batch.cursor != 0
            for key, bitmap in batch.bitmaps.items():
                for slot in _bits(bitmap):
                    if slot not in retired:
                        owner = table.workers.get(slot, PeerRef("", 0))
                        found.setdefault(owner, set()).add(layout.hash_of(key))
        return found

    async def difference(self, client: IndexClient, num_lookups: int) -> str:
        """How the index and the trees differ; empty when it is exact: every bit in Redis, and every answer to
        some prompts. Nothing may change meanwhile."""
        try:
            stored = await self.stored()
        except PhloemError as error:
            return f"Redis: {error}"
        trees = {worker.ref: worker.blocks() for worker in self.workers}
        live = {ref: blocks for ref, blocks in stored.items() if ref in trees}
        if live != trees:
            wrong = [
                f"{ref.worker_id}: {len(live.get(ref, set()) - blocks)} false, "
                f"{len(blocks - live.get(ref, set()))} missing"
                for ref, blocks in trees.items()
                if live.get(ref) != blocks
            ]
            return "bits of " + ", ".join(wrong)
        chains = self._rng.sample(self.prompts.hashes, min(num_lookups, len(self.prompts.hashes)))
        for chain in chains:
            held = (await client.lookup(chain)).held
            expected = {ref: n * BLOCK_TOKENS for ref, tree in trees.items() if (n := _held(tree, chain))}
            if held != expected:
                return f"a look-up says {held} instead of {expected}"
        return ""

    async def _kill(self, worker: TreeWorker) -> None:
        self.workers.remove(worker)
        task = self._tasks.pop(worker.ref)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def running_forest(
    redis_url: str, num_workers: int, rng: random.Random, *, num_prompts: int = 200
) -> AsyncIterator[Forest]:
    forest = Forest(redis_url, Prompts(rng, num_prompts), rng)
    try:
        await forest.registry.connect(30.0, on_wait=lambda _: None)
        for number in range(num_workers):
            await forest.start_worker(f"worker-{number}")
        yield forest
    finally:
        await forest.close()


async def follow_replicas(redis_url: str, client: IndexClient) -> None:
    """Tells the client which replicas live, as a gateway does, until cancelled."""
    registry = Registry(redis_url)
    try:
        async for snapshot in registry.watch():
            await client.set_addresses([s.address for s in snapshot.services if s.kind == "cache_index"])
    finally:
        await registry.close()


def _held(tree: set[bytes], chain: Sequence[bytes]) -> int:
    return next((index for index, block in enumerate(chain) if block not in tree), len(chain))


def _bits(bitmap: int) -> list[int]:
    return [slot for slot in range(bitmap.bit_length()) if bitmap >> slot & 1]


def _tokens(rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(50_000), k=count)

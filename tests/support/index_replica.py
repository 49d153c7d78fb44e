"""The parts of one index replica over a real Redis, without its server and its background tasks."""

from __future__ import annotations

from hashlib import blake2b

from prometheus_client import CollectorRegistry

from phloem.services.cache_index.announcer import Announcer
from phloem.services.cache_index.matcher import Matcher
from phloem.services.cache_index.metrics import IndexMetrics
from phloem.services.cache_index.near_cache import NearCache
from phloem.services.cache_index.service import IndexService
from phloem.services.cache_index.slots import Slots
from phloem.services.cache_index.store import BlockStore
from phloem.services.cache_index.sweeper import Sweeper
from phloem.shared.discovery.redis_link import RedisLink
from phloem.shared.discovery.registry import Registry
from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.protocol.index import Match
from phloem.shared.protocol.session import PeerRef

TIMEOUT_S = 10.0  # a machine that stands still for half a second is no mistake of the index


class IndexReplica:
    """Sees who lives only when told to (`observe`), and sweeps only when told to."""

    def __init__(
        self, redis_url: str, *, max_slots: int = 64, grace_s: float = 0.0, near_ttl_s: float = 0.0
    ) -> None:
        self.link = RedisLink(redis_url, timeout_s=TIMEOUT_S)
        self.prometheus = CollectorRegistry()
        self.metrics = IndexMetrics(self.prometheus)
        self.store = BlockStore(self.link, read_timeout_s=TIMEOUT_S, write_timeout_s=TIMEOUT_S)
        self.slots = Slots(self.link, max_slots)
        self.near = NearCache(max_blocks=1024, ttl_s=near_ttl_s)
        self.matcher = Matcher(self.store, self.slots, self.near, self.metrics, timeout_s=TIMEOUT_S)
        self.announcer = Announcer(self.store, self.metrics, ttl_s=60.0)
        self.sweeper = Sweeper(self.store, self.slots, self.metrics, interval_s=60.0, grace_s=grace_s)
        self.service = IndexService(
            self.store, self.slots, self.matcher, self.near, self.announcer, self.metrics
        )

    def observe(self, snapshot: ClusterSnapshot) -> None:
        self.matcher.set_snapshot(snapshot)
        self.sweeper.set_snapshot(snapshot)

    async def observe_registry(self, registry: Registry) -> None:
        """Takes what is registered now for what lives."""
        reading = await registry.read()
        self.observe(ClusterSnapshot(workers=tuple(reading.workers.values()), redis_ok=True))

    async def lengths(self, block_hashes: list[bytes]) -> dict[PeerRef, int]:
        """The answer to a Match: worker -> leading blocks."""
        matched = await self.service.on_match(Match(block_hashes))
        return {holder.worker: holder.num_blocks for holder in matched.holders}

    async def close(self) -> None:
        await self.link.close()


def some_hash(*path: object) -> bytes:
    """A block hash that stands for `path`."""
    return blake2b(repr(path).encode(), digest_size=16).digest()


def some_chain(name: str, num_blocks: int) -> list[bytes]:
    return [some_hash(name, index) for index in range(num_blocks)]

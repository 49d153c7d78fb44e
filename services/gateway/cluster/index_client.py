"""Asks cache_index which workers hold a prompt's prefix, and tells it where the prompt went; routing never
waits for it for long."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from phloem.services.gateway.cluster.index_stream import IndexStream, first_up
from phloem.services.gateway.cluster.metrics import ClusterMetrics
from phloem.shared.block_hash import BLOCK_TOKENS, landmarks
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.index import Announce, Holder, Matched
from phloem.shared.protocol.session import PeerRef

log = logging.getLogger(__name__)


class KnownPrefixes(NamedTuple):
    """Leading tokens of a prompt by worker; workers that have none are left out.

    `held` is in the worker's tree. `announced` is what some gateway sent there a moment ago: for routing
    only.
    """

    held: dict[PeerRef, int]
    announced: dict[PeerRef, int]


class _Replica(NamedTuple):
    stream: IndexStream
    running: asyncio.Task[None]

    async def close(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)


class IndexClient:
    """Spreads look-ups over the live replicas. Fails open: no answer in time is an empty one, and counted."""

    def __init__(self, cluster_secret: bytes, timeout_s: float, metrics: ClusterMetrics) -> None:
        self._cluster_secret = cluster_secret
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._replicas: dict[str, _Replica] = {}
        self._streams: list[IndexStream] = []
        self._retired: deque[tuple[float, _Replica]] = deque()
        self._num_calls = 0

    @property
    def num_replicas(self) -> int:
        return len(self._replicas)

    async def set_addresses(self, addresses: Sequence[str]) -> None:
        """The replicas that live now. Streams to others are closed once no look-up can be on them."""
        now = time.monotonic()
        for address in [known for known in self._replicas if known not in addresses]:
            self._retired.append((now, self._replicas.pop(address)))
        for address in addresses:
            if address not in self._replicas:
                stream = IndexStream(address, self._cluster_secret)
                running = asyncio.create_task(stream.run(), name=f"index {address}")
                self._replicas[address] = _Replica(stream, running)
        self._streams = [replica.stream for replica in self._replicas.values()]
        while self._retired and now - self._retired[0][0] > 2 * self._timeout_s:
            await self._retired.popleft()[1].close()

    async def lookup(self, block_hashes: list[bytes]) -> KnownPrefixes:
        """What the index knows of the prompt, within the deadline; nothing when it does not answer."""
        if not block_hashes or not self._replicas:
            return KnownPrefixes({}, {})
        start = time.perf_counter()
        matched = await self._match(block_hashes)
        self._metrics.index_lookup_seconds.observe(time.perf_counter() - start)
        if matched is None:
            self._metrics.index_misses.inc()
            return KnownPrefixes({}, {})
        return KnownPrefixes(_tokens(matched.holders), _tokens(matched.announced))

    def announce(self, block_hashes: Sequence[bytes], worker: PeerRef) -> None:
        """`worker` was just given this chain to compute. Tells the other gateways, soon and without a word
        back; never waits, and is dropped (and counted) when the index can't keep up."""
        if not block_hashes or not self._replicas:
            return
        marks = [block_hashes[index] for index in landmarks(len(block_hashes))]
        stream = first_up(self._streams, self._num_calls)
        sent = stream is not None and stream.announce(Announce(worker, marks))
        self._metrics.announcements.labels("sent" if sent else "dropped").inc()

    async def close(self) -> None:
        """Closes all streams; no look-up may be under way."""
        replicas = [*self._replicas.values(), *(replica for _, replica in self._retired)]
        self._replicas.clear()
        self._retired.clear()
        self._streams = []
        for replica in replicas:
            await replica.close()

    async def _match(self, block_hashes: list[bytes]) -> Matched | None:
        self._num_calls += 1
        stream = first_up(self._streams, self._num_calls)
        if stream is None:
            return None
        try:
            async with asyncio.timeout(self._timeout_s):
                return await stream.lookup(block_hashes)
        except (TimeoutError, PhloemError) as error:
            log.debug("the index did not answer: %s", error)
            return None


def _tokens(holders: Sequence[Holder]) -> dict[PeerRef, int]:
    return {holder.worker: holder.num_blocks * BLOCK_TOKENS for holder in holders}

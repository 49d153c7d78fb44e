"""Asks cache_index which workers hold a prompt's prefix; routing never waits for it for long."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence

from phloem.services.gateway.cluster.metrics import ClusterMetrics
from phloem.shared.block_hash import BLOCK_TOKENS
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.index import INDEX_SERVICE, Match, match, matched
from phloem.shared.protocol.session import PeerRef
from phloem.shared.rpc.client import RpcChannel

log = logging.getLogger(__name__)


class IndexClient:
    """Spreads look-ups over the live replicas. Fails open: no answer in time is an empty one, and counted."""

    def __init__(self, cluster_secret: bytes, timeout_s: float, metrics: ClusterMetrics) -> None:
        self._cluster_secret = cluster_secret
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._channels: dict[str, RpcChannel] = {}
        self._retired: deque[tuple[float, RpcChannel]] = deque()
        self._num_calls = 0

    @property
    def num_replicas(self) -> int:
        return len(self._channels)

    async def set_addresses(self, addresses: Sequence[str]) -> None:
        """The replicas that live now. Channels to others are closed once no look-up can be on them any more:
        closing a channel cancels whoever waits on it."""
        now = time.monotonic()
        for address in [known for known in self._channels if known not in addresses]:
            self._retired.append((now, self._channels.pop(address)))
        for address in addresses:
            if address not in self._channels:
                self._channels[address] = RpcChannel(address, self._cluster_secret)
        while self._retired and now - self._retired[0][0] > 2 * self._timeout_s:
            await self._retired.popleft()[1].close()

    async def cached_tokens(self, block_hashes: list[bytes]) -> dict[PeerRef, int]:
        """Leading tokens of the prompt that each worker holds; workers that hold none are left out."""
        if not block_hashes or not self._channels:
            return {}
        self._num_calls += 1
        channels = list(self._channels.values())
        call = channels[self._num_calls % len(channels)].unary(INDEX_SERVICE, "Match", match, matched)
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await call(Match(block_hashes), self._timeout_s)
        except (TimeoutError, PhloemError) as error:
            self._metrics.index_misses.inc()
            log.debug("the index did not answer: %s", error)
            return {}
        return {holder.worker: holder.num_blocks * BLOCK_TOKENS for holder in answer.holders}

    async def close(self) -> None:
        """Closes all channels; no look-up may be under way."""
        channels = [*self._channels.values(), *(channel for _, channel in self._retired)]
        self._channels.clear()
        self._retired.clear()
        for channel in channels:
            await channel.close()

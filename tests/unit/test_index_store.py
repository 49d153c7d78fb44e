"""Publishing in bounded parts: order, fencing, and messages that were cut short."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from phloem.services.cache_index import layout
from phloem.services.cache_index.store import BLOCKS_PER_SCRIPT, BlockStore
from phloem.shared.discovery.redis_link import Argument, RedisLink, Script
from phloem.shared.errors import PhloemError, unavailable
from phloem.shared.protocol.index import Publish
from phloem.shared.protocol.session import PeerRef
from tests.support.index_replica import IndexReplica, some_chain
from tests.support.valkey import ValkeyServer

WORKER = PeerRef("w", 7)
CHAIN = some_chain("long", 3 * BLOCKS_PER_SCRIPT + 5)


class LinkThatBreaks(RedisLink):
    """Runs `num_left` scripts, then none."""

    def __init__(self, url: str, num_left: int) -> None:
        super().__init__(url)
        self.num_left = num_left

    async def script(
        self,
        script: Script,
        keys: Sequence[Argument],
        args: Sequence[Argument],
        timeout_s: float | None = None,
    ) -> Any:
        if self.num_left == 0:
            raise unavailable("broken", code="redis_unavailable")
        self.num_left -= 1
        return await super().script(script, keys, args, timeout_s)


@pytest.fixture
async def replica(valkey: ValkeyServer) -> AsyncIterator[IndexReplica]:
    replica = IndexReplica(valkey.url)
    assert await replica.slots.attach(WORKER) == 0
    yield replica
    await replica.close()


def publish(seq: int, stored: list[bytes] | None = None, removed: list[bytes] | None = None) -> Publish:
    return Publish(worker=WORKER, slot=0, seq=seq, stored=stored or [], removed=removed or [])


async def held(store: BlockStore, chain: list[bytes] = CHAIN) -> list[bool]:
    return [bool(bitmap & 1) for bitmap in (await store.read(chain)).bitmaps]


async def test_long_message_is_applied_whole(replica: IndexReplica) -> None:
    await replica.store.publish(publish(1, stored=CHAIN))
    assert all(await held(replica.store))
    await replica.store.publish(publish(2, stored=CHAIN[:1], removed=CHAIN[2:]))
    assert await held(replica.store) == [True, True] + [False] * (len(CHAIN) - 2)


async def test_removing_the_last_holder_leaves_no_key(replica: IndexReplica) -> None:
    await replica.store.publish(publish(1, stored=CHAIN[:10]))
    await replica.store.publish(publish(2, removed=CHAIN[:20]))
    assert await replica.link.command("EXISTS", *map(layout.block_key, CHAIN[:20])) == 0


async def test_removing_keeps_other_holders(replica: IndexReplica) -> None:
    other = PeerRef("other", 1)
    slot = await replica.slots.attach(other)
    await replica.store.publish(publish(1, stored=CHAIN[:3]))
    await replica.store.publish(Publish(worker=other, slot=slot, seq=1, stored=CHAIN[:3]))
    await replica.store.publish(publish(2, removed=CHAIN[:3]))
    assert (await replica.store.read(CHAIN[:3])).bitmaps == [1 << slot] * 3


async def test_message_cut_short_can_be_sent_again(replica: IndexReplica, valkey: ValkeyServer) -> None:
    link = LinkThatBreaks(valkey.url, num_left=2)
    breaking = BlockStore(link, read_timeout_s=1.0, write_timeout_s=1.0)
    with pytest.raises(PhloemError, match="broken"):
        await breaking.publish(publish(1, stored=CHAIN))
    assert sum(await held(replica.store)) == 2 * BLOCKS_PER_SCRIPT
    await replica.store.publish(publish(1, stored=CHAIN))
    assert all(await held(replica.store))
    await link.close()


async def test_late_part_of_an_old_message_changes_nothing(
    replica: IndexReplica, valkey: ValkeyServer
) -> None:
    """A replica stalled in the middle of message 1, the worker sent it to another one, then went on."""
    link = LinkThatBreaks(valkey.url, num_left=1)
    stalled = BlockStore(link, read_timeout_s=1.0, write_timeout_s=1.0)
    with pytest.raises(PhloemError, match="broken"):
        await stalled.publish(publish(1, stored=CHAIN))
    await replica.store.publish(publish(1, stored=CHAIN))
    await replica.store.publish(publish(2, removed=CHAIN))
    link.num_left = 10
    with pytest.raises(PhloemError) as caught:
        await stalled.publish(publish(1, stored=CHAIN))
    assert caught.value.code == "resync_needed"
    assert not any(await held(replica.store))
    await link.close()


@pytest.mark.parametrize("seq", [2, 7])
async def test_first_message_must_have_seq_one(replica: IndexReplica, seq: int) -> None:
    with pytest.raises(PhloemError) as caught:
        await replica.store.publish(publish(seq, stored=CHAIN[:1]))
    assert (caught.value.code, caught.value.retryable) == ("resync_needed", True)
    assert not any(await held(replica.store, CHAIN[:1]))


@pytest.mark.parametrize(
    "message",
    [
        Publish(worker=PeerRef("w", 8), slot=0, seq=1, stored=CHAIN[:1]),
        Publish(worker=PeerRef("v", 7), slot=0, seq=1, stored=CHAIN[:1]),
        Publish(worker=WORKER, slot=1, seq=1, stored=CHAIN[:1]),
    ],
    ids=["another epoch", "another worker", "another slot"],
)
async def test_publishing_to_a_slot_of_somebody_else_is_refused(
    replica: IndexReplica, message: Publish
) -> None:
    with pytest.raises(PhloemError) as caught:
        await replica.store.publish(message)
    assert caught.value.code == "resync_needed"
    assert (await replica.store.read(CHAIN[:1])).bitmaps == [0]


async def test_message_without_blocks_counts(replica: IndexReplica) -> None:
    await replica.store.publish(publish(1))
    await replica.store.publish(publish(2, stored=CHAIN[:1]))
    assert await held(replica.store, CHAIN[:1]) == [True]

"""A gateway's stream of look-ups, and the comparison of digests, at their edges."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from phloem.services.cache_index import layout
from phloem.services.cache_index.lookup_session import MAX_LOOKUPS_UNDER_WAY, LookupSession
from phloem.shared.batch_queue import BatchQueue
from phloem.shared.errors import PhloemError, unavailable
from phloem.shared.protocol.index import (
    Announce,
    Answer,
    Holder,
    IndexDown,
    Lookup,
    Match,
    Matched,
    Publish,
    Verify,
)
from phloem.shared.protocol.session import PeerRef
from phloem.shared.tree_digest import TreeDigest
from tests.support.index_replica import IndexReplica, some_chain
from tests.support.valkey import ValkeyServer
from tests.support.waiting import until

WORKER = PeerRef("w", 7)
CHAIN = some_chain("prompt", 600)
MATCHED = Matched([Holder(WORKER, 1)])


class Gateway:
    """The other end of a session. Look-ups are answered when `gate` is open; those of no block fail."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.announced: list[Announce] = []
        self.answers: list[Answer] = []
        self.num_frames = 0
        self._down: BatchQueue[IndexDown] = BatchQueue(10_000)
        self._session = LookupSession(self._match, self.announced.append)

    def say(self, *messages: IndexDown) -> None:
        self._down.force_all(messages)

    def hang_up(self) -> None:
        self._down.close()

    async def listen(self) -> None:
        async for answers in self._session.serve(self._frames()):
            self.num_frames += 1
            self.answers += answers

    async def _frames(self) -> AsyncIterator[list[IndexDown]]:
        while messages := await self._down.take_all():
            yield messages

    async def _match(self, message: Match) -> Matched:
        await self.gate.wait()
        if not message.block_hashes:
            raise unavailable("no Redis", code="redis_unavailable")
        return MATCHED


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    listening = asyncio.create_task(gateway.listen())
    yield gateway
    gateway.hang_up()
    async with asyncio.timeout(5.0):
        await listening


async def test_stream_says_that_it_is_open_before_anything_is_asked(gateway: Gateway) -> None:
    await until(lambda: gateway.num_frames == 1)
    assert gateway.answers == []


async def test_each_lookup_gets_its_own_answer_or_error(gateway: Gateway) -> None:
    gateway.say(Lookup(1, CHAIN), Announce(WORKER, CHAIN[:1]), Lookup(2, []), Lookup(3, CHAIN))
    await until(lambda: len(gateway.answers) == 3)
    answers = {answer.id: answer for answer in gateway.answers}
    assert answers[1].matched == answers[3].matched == MATCHED
    assert answers[2].error is not None and answers[2].error.code == "redis_unavailable"
    assert gateway.announced == [Announce(WORKER, CHAIN[:1])]


async def test_more_lookups_than_the_bound_are_refused_at_once(gateway: Gateway) -> None:
    gateway.gate.clear()
    gateway.say(*(Lookup(number, CHAIN) for number in range(MAX_LOOKUPS_UNDER_WAY + 3)))
    await until(lambda: len(gateway.answers) == 3)
    assert {answer.error.code for answer in gateway.answers if answer.error is not None} == {"overloaded"}
    gateway.gate.set()
    await until(lambda: len(gateway.answers) == MAX_LOOKUPS_UNDER_WAY + 3)


async def test_gateway_that_hangs_up_cancels_what_is_under_way() -> None:
    gateway = Gateway()
    gateway.gate.clear()
    listening = asyncio.create_task(gateway.listen())
    gateway.say(Lookup(1, CHAIN))
    await until(lambda: gateway.num_frames == 1)
    gateway.hang_up()
    async with asyncio.timeout(5.0):
        await listening
    assert gateway.answers == []


@pytest.fixture
async def replica(valkey: ValkeyServer) -> AsyncIterator[IndexReplica]:
    """Slot 0 is WORKER's, at seq 2, and holds all but the last 100 blocks of CHAIN."""
    replica = IndexReplica(valkey.url)
    assert await replica.slots.attach(WORKER) == 0
    await replica.store.publish(Publish(worker=WORKER, slot=0, seq=1, stored=CHAIN))
    await replica.store.publish(Publish(worker=WORKER, slot=0, seq=2, removed=CHAIN[500:]))
    yield replica
    await replica.close()


def verification(
    blocks: list[bytes], *, seq: int = 2, slot: int = 0, worker: PeerRef = WORKER, sample: int = 300
) -> Verify:
    digest = TreeDigest()
    for block in blocks:
        digest.add(block)
    return Verify(
        worker=worker,
        slot=slot,
        seq=seq,
        num_blocks=digest.num_blocks,
        digest=digest.value,
        sample=blocks[:sample],
    )


async def test_digest_of_what_was_published_is_equal(replica: IndexReplica) -> None:
    assert (await replica.service.on_verify(verification(CHAIN[:500]))).seq == 2


@pytest.mark.parametrize(
    "different",
    [
        verification(CHAIN[:499]),
        verification(CHAIN[:501]),
        verification([*CHAIN[:499], CHAIN[500]]),
        verification(CHAIN[:500], seq=1),
        verification(CHAIN[:500], slot=1),
        verification(CHAIN[:500], worker=PeerRef("w", 8)),
    ],
)
async def test_anything_else_needs_a_resync(replica: IndexReplica, different: Verify) -> None:
    with pytest.raises(PhloemError) as caught:
        await replica.service.on_verify(different)
    assert (caught.value.code, caught.value.retryable) == ("resync_needed", True)


async def test_lost_key_is_noticed_in_the_sample_and_by_its_removal(replica: IndexReplica) -> None:
    await replica.link.command("DEL", layout.block_key(CHAIN[10]))
    with pytest.raises(PhloemError):
        await replica.service.on_verify(verification(CHAIN[:500]))
    await replica.service.on_verify(verification(CHAIN[:500], sample=5))
    removal = Publish(worker=WORKER, slot=0, seq=3, removed=CHAIN[10:500])
    await replica.service.on_publish(removal)
    with pytest.raises(PhloemError):
        await replica.service.on_verify(verification(CHAIN[:10], seq=3, sample=5))


async def test_digest_of_a_message_applied_twice_counts_once(replica: IndexReplica) -> None:
    for _ in range(2):
        await replica.store.publish(Publish(worker=WORKER, slot=0, seq=3, stored=CHAIN))
    await replica.service.on_verify(verification(CHAIN, seq=3))


async def test_too_large_a_sample_is_refused(replica: IndexReplica) -> None:
    with pytest.raises(PhloemError) as caught:
        await replica.service.on_verify(verification(CHAIN * 2, sample=1200))
    assert caught.value.info.param == "sample"

"""The small parts of a front: the batch queue, pending changes, peers, the engine's environment."""

from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phloem.shared.batch_queue import BatchQueue
from phloem.shared.config.loader import load_config
from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.errors import ConfigError
from phloem.shared.protocol.cluster import Role, WorkerRecord
from phloem.shared.protocol.engine import PeerDown, PeerUp
from phloem.shared.protocol.session import PeerRef
from phloem.shared.worker.config import WorkerConfig
from phloem.shared.worker.engine_env import engine_environment, usable_cores
from phloem.shared.worker.peers import Peers, misfit
from phloem.shared.worker.pending_changes import PendingChanges
from phloem.shared.worker.progress_log import INTERVAL_S, ProgressLog
from tests.support.worker_records import new_record


async def test_batch_queue_refuses_beyond_its_bound_but_not_what_is_forced() -> None:
    queue: BatchQueue[int] = BatchQueue(2)
    assert [queue.offer(n) for n in range(3)] == [True, True, False]
    queue.force(3)
    assert await queue.take_all() == [0, 1, 3]


async def test_batch_queue_lets_a_waiting_producer_in_when_there_is_room() -> None:
    queue: BatchQueue[int] = BatchQueue(1)
    queue.force(1)
    putting = asyncio.create_task(queue.put(2))
    await asyncio.sleep(0)
    assert not putting.done()
    assert await queue.take_all() == [1]
    assert await putting
    assert await queue.take_all() == [2]


async def test_closed_batch_queue_gives_what_is_left_then_nothing() -> None:
    queue: BatchQueue[int] = BatchQueue(5)
    queue.force(1)
    waiting = asyncio.create_task(queue.put(2))
    await waiting
    queue.close()
    assert not queue.offer(3)
    assert await queue.take_all() == [1, 2]
    assert await queue.take_all() == []


Change: TypeAlias = tuple[set[bytes], set[bytes]]  # stored, removed

blocks = st.integers(0, 5).map(lambda n: bytes([n]) * 16)
steps = st.lists(st.tuples(st.sets(blocks, max_size=4), st.sets(blocks, max_size=4)), max_size=20)


@given(steps, st.integers(1, 3))
def test_published_changes_add_up_to_the_tree(changes: list[Change], size: int) -> None:
    """However the changes are cut into batches, applying them in order gives the tree's own blocks."""
    pending = PendingChanges(1000)
    tree: set[bytes] = set()
    index: set[bytes] = set()
    for number, (stored, removed) in enumerate(changes):
        stored = stored - removed
        pending.note(stored, removed)
        tree = (tree - removed) | stored
        if number % 2:
            _apply(pending, index, size)
    while len(pending):
        _apply(pending, index, size)
    assert index == tree


def _apply(pending: PendingChanges, index: set[bytes], size: int) -> None:
    stored, removed = pending.take(size)
    assert len(stored) + len(removed) <= size
    index.difference_update(removed)
    index.update(stored)


def test_too_many_changes_overflow_until_the_whole_tree_is_given() -> None:
    pending = PendingChanges(2)
    pending.note([b"a", b"b", b"c"], [])
    assert pending.overflowed and len(pending) == 0
    pending.note([b"d"], [])
    assert len(pending) == 0
    pending.replace([b"x", b"y", b"z"])
    assert pending.take(10) == ([b"x", b"y", b"z"], [])


def record(worker_id: str, role: Role, *, epoch: int = 1, layout: str = "kv") -> WorkerRecord:
    return new_record(worker_id, role, epoch=epoch, kv_layout=layout, transfer_address=f"{worker_id}:9")


def changes_of(peers: Peers, *workers: WorkerRecord) -> list[PeerUp | PeerDown]:
    return peers.update(ClusterSnapshot(workers=workers, redis_ok=True))


def test_prefill_worker_dials_decode_capable_workers_of_its_layout() -> None:
    peers = Peers(record("p", "prefill"))
    others = [
        record("d", "decode"),
        record("u", "unified"),
        record("p2", "prefill"),
        record("x", "decode", layout="other"),
    ]
    assert changes_of(peers, record("p", "prefill"), *others) == [
        PeerUp(PeerRef("d", 1), "d:9"),
        PeerUp(PeerRef("u", 1), "u:9"),
    ]
    assert changes_of(peers, *others) == []


def test_restarted_peer_is_lost_and_found() -> None:
    peers = Peers(record("p", "prefill"))
    changes_of(peers, record("d", "decode"))
    assert changes_of(peers, record("d", "decode", epoch=2)) == [
        PeerDown(PeerRef("d", 1)),
        PeerUp(PeerRef("d", 2), "d:9"),
    ]


def test_decode_worker_hears_only_of_losses() -> None:
    peers = Peers(record("d", "decode"))
    assert changes_of(peers, record("p", "prefill"), record("u", "unified")) == []
    assert changes_of(peers) == [PeerDown(PeerRef("p", 1)), PeerDown(PeerRef("u", 1))]


def test_unified_workers_open_no_channel_between_them() -> None:
    peers = Peers(record("u", "unified"))
    assert changes_of(peers, record("u2", "unified"), record("d", "decode")) == [
        PeerUp(PeerRef("d", 1), "d:9")
    ]


def test_worker_of_another_layout_is_named_once_by_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody dials it, and nobody else says why it gets no request."""
    own, other = record("p", "prefill"), record("d", "decode", layout="other")
    wide = msgspec.structs.replace(other, page_size=32)
    for peers, joins in ((Peers(own), wide), (Peers(wide), own)):
        caplog.clear()
        for _ in range(3):
            assert changes_of(peers, joins) == []
        (text,) = [line.getMessage() for line in caplog.records if line.levelname == "WARNING"]
        assert text.startswith(f"no KV channel with {joins.worker_id} (epoch 1), requests go elsewhere: ")
        assert "'other'" in text and "'kv'" in text and "the same model, dtype and page size" in text
        assert "page size: " in text and "model: " not in text
    changes_of(peers, msgspec.structs.replace(own, epoch=2))
    assert len(caplog.records) == 2, "its next self may differ in other ways"


def test_workers_that_never_pair_may_differ(caplog: pytest.LogCaptureFixture) -> None:
    peers = Peers(record("p", "prefill"))
    assert changes_of(peers, record("p2", "prefill", layout="other"), record("d", "decode")) == [
        PeerUp(PeerRef("d", 1), "d:9")
    ]
    assert caplog.records == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"page_size": 32}, "page size: 32 there, 16 here"),
        ({"kv_bytes_per_token": 100}, "bytes of KV a token: 100 there, 0 here"),
        ({"model_id": "n"}, "model: n there, m here"),
        ({}, "--load-format"),
    ],
)
def test_what_differs_between_layouts_is_told_as_far_as_it_is_known(
    changes: dict[str, Any], said: str
) -> None:
    other = msgspec.structs.replace(record("d", "decode", layout="other"), **changes)
    assert said in misfit(record("p", "prefill"), other)
    assert misfit(record("p", "prefill"), record("d", "decode")) == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_worker_never_binds_to_all_addresses(host: str) -> None:
    with pytest.raises(ConfigError, match="auto-private"):
        load_config(WorkerConfig, section="decode", overrides={"host": host})


def test_engine_flags_are_flat_beside_the_fronts_own() -> None:
    config = load_config(WorkerConfig, section="decode", overrides={"page_size": "32", "port": "1234"})
    assert (config.engine.page_size, config.port) == (32, 1234)
    with pytest.raises(ConfigError, match="--page-size"):
        load_config(WorkerConfig, section="decode", overrides={"page_size": "65"})


@pytest.mark.parametrize(("num_threads", "expected"), [(3, "3"), (0, str(usable_cores()))])
def test_engine_threads_are_counted_and_wait_passively(num_threads: int, expected: str) -> None:
    env = engine_environment(num_threads, {"PATH": "/bin", "OMP_NUM_THREADS": "99"})
    assert (env["PATH"], env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"]) == ("/bin", expected, expected)
    assert env["OMP_WAIT_POLICY"] == "PASSIVE"


def test_progress_is_logged_where_a_stage_begins_and_ends_and_seldom_between(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    now = 0.0
    progress = ProgressLog(lambda: now)
    for done in range(101):
        progress("weights", done, 100)
        now += INTERVAL_S / 32
    progress("warmup", 0, 1)
    lines = [vars(record) for record in caplog.records]
    assert [(line["stage"], line["done"]) for line in lines] == [
        ("weights", 0),
        ("weights", 32),
        ("weights", 64),
        ("weights", 96),
        ("weights", 100),
        ("warmup", 0),
    ]

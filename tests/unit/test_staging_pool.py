"""Who gets how much staging memory, and when it comes back."""

from __future__ import annotations

import gc
import threading
import time
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phloem.shared.errors import PhloemError
from phloem.shared.transfer.config import TransferConfig, num_staging_blocks
from phloem.shared.transfer.staging import StagingSlot
from phloem.shared.transfer.staging_pool import StagingLease, StagingPool, blocks_to_lend
from tests.support.transfer import DECODE, transfer_config

BLOCK = 4096


def config(*, peers: int = 3, slots: int = 4, least: int = 1) -> TransferConfig:
    return msgspec.structs.replace(
        transfer_config(DECODE, staging_bytes=BLOCK),
        staging_slots=slots,
        max_peers=peers,
        least_slot_bytes=least,
    )


def cut(lease: StagingLease, most: int = 64, slot_bytes: int = 0) -> list[StagingSlot]:
    return lease.slots("c", slot_bytes or lease.slot_bytes, most)


# -- the decision --------------------------------------------------------------------------------------


@given(
    st.integers(1, 20),
    st.integers(1, 8),
    st.lists(st.one_of(st.sampled_from(["join", "join", "return"]), st.integers(0, 30)), max_size=80),
)
def test_every_one_of_the_peers_gets_memory_however_they_come_and_go_and_nobody_else(
    max_peers: int, staging_slots: int, moves: list[str | int]
) -> None:
    """Channels return the blocks for which their peers give no credit."""
    total = num_staging_blocks(max_peers, staging_slots)
    leases: list[int] = []
    for move in moves:
        if move == "return":
            leases[-1:] = [1 for _ in leases[-1:]]
            continue
        if isinstance(move, int):
            if leases:
                leases.pop(move % len(leases))
            continue
        count = blocks_to_lend(total - sum(leases), len(leases), max_peers, staging_slots)
        assert 0 <= count <= staging_slots
        assert (count >= 1) == (len(leases) < max_peers)
        if not leases:
            assert count == staging_slots, "alone it gets all that it can use"
        if count:
            leases.append(count)
        assert sum(leases) <= total


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 30))
def test_who_comes_first_has_what_lost_channels_have_left(
    max_peers: int, staging_slots: int, num_lost: int
) -> None:
    free = max(0, num_staging_blocks(max_peers, staging_slots) - num_lost)
    for num_others in range(max_peers):
        assert blocks_to_lend(0, num_others, max_peers, staging_slots, 2) == 0, "not before it is back"
        count = blocks_to_lend(free, num_others, max_peers, staging_slots)
        assert (count > 0) == (free > 0) and count <= min(free, staging_slots)
        free -= count
    assert blocks_to_lend(free, max_peers, max_peers, staging_slots) == 0


# -- leases --------------------------------------------------------------------------------------------


def test_memory_is_allocated_once_and_slots_are_pieces_of_it() -> None:
    pool = StagingPool(config(peers=3, slots=4))
    first, second, third = (pool.lend(name) for name in "abc")
    slots = [cut(lease) for lease in (first, second, third)]
    assert [(len(own), own[0].tensor.numel()) for own in slots] == [
        (4, BLOCK),
        (2, BLOCK // 2),  # the only block, in two: one is filled while the other is sent
        (2, BLOCK // 2),
    ]
    memory = {slot.tensor.untyped_storage().data_ptr() for own in slots for slot in own}
    assert len(memory) == 1
    ranges = sorted(
        (slot.tensor.data_ptr(), slot.tensor.data_ptr() + slot.tensor.numel())
        for own in slots
        for slot in own
    )
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges)), "no overlap"
    assert pool.lent_bytes == 6 * BLOCK


def test_blocks_and_slots_begin_where_kernels_may_read_several_bytes_at_a_time() -> None:
    pool = StagingPool(msgspec.structs.replace(config(peers=3, slots=2), staging_bytes=5001))
    slots = cut(pool.lend("a")) + cut(pool.lend("b"))
    assert [slot.tensor.numel() for slot in slots] == [5001, 5001, 2304, 2304]
    base = min(slot.tensor.data_ptr() for slot in slots)
    assert all((slot.tensor.data_ptr() - base) % 256 == 0 for slot in slots)


def test_one_more_than_there_is_memory_for_is_refused_with_the_flag() -> None:
    pool = StagingPool(config(peers=2, slots=1))
    held = [pool.lend("a"), pool.lend("b")]
    with pytest.raises(PhloemError, match=r"--transfer-peers.*0\.003906 MiB") as caught:
        pool.lend("c")
    assert (caught.value.code, caught.value.retryable) == ("staging_full", True)
    held[0].close()
    assert pool.lend("c").blocks


def test_blocks_that_a_peer_gave_no_credit_for_are_no_room_for_another_peer() -> None:
    pool = StagingPool(config(peers=2, slots=4))
    first, second = pool.lend("a"), pool.lend("b")
    assert len(cut(first, most=1)) == len(cut(second, most=1)) == 1
    assert pool.lent_bytes == 2 * BLOCK, "of five"
    with pytest.raises(PhloemError, match=r"2 peers, and 2 channels have it: .* --transfer-peers"):
        pool.lend("c")
    first.close()
    assert len(pool.lend("c").blocks) == 4


def test_peer_that_comes_again_is_not_kept_out_by_its_own_channel_nor_are_others_by_both() -> None:
    """NCCL may take a minute to let go of a channel whose peer has died; the peer is back before."""
    pool = StagingPool(config(peers=2, slots=4))
    hangs = pool.lend("a")
    assert len(cut(hangs, most=1)) == 1
    again = pool.lend("a", 0.02)
    assert again.blocks and not hangs.is_closed
    assert pool.lend("b").blocks
    with pytest.raises(PhloemError, match="2 channels have it"):
        pool.lend("c")
    again.close()
    with pytest.raises(PhloemError, match="2 channels have it"):
        pool.lend("c")  # NCCL's memory is not back
    hangs.close()
    assert pool.lend("c").blocks


def test_memory_that_is_coming_back_is_not_a_reason_to_restart() -> None:
    pool = StagingPool(config(peers=1, slots=1))
    lease = pool.lend("a")
    slots = cut(lease)
    lease.close()
    with pytest.raises(PhloemError, match=r"1 peer, and channels that have ended .* coming back") as caught:
        pool.lend("b")
    assert caught.value.code == "staging_full"
    slots.clear()
    assert pool.lend("b").blocks


@pytest.mark.parametrize(("device", "mib"), [("cpu", "128"), ("cuda:0", "320")])
def test_refusal_says_what_one_peer_more_costs_nccl_included(device: str, mib: str) -> None:
    made = TransferConfig(me=DECODE, host="", cluster_secret=b"", kv_layout="", device=device)
    assert made.bytes_per_peer == int(mib) << 20


def test_slots_of_the_size_that_the_peer_can_have_give_the_rest_back() -> None:
    pool = StagingPool(config(peers=2, slots=4))
    lease = pool.lend("a")
    slots = cut(lease, most=2, slot_bytes=BLOCK // 2)
    assert [slot.tensor.numel() for slot in slots] == [BLOCK // 2] * 2
    assert pool.lent_bytes == BLOCK, "two halves are one block"
    assert len(pool.lend("b").blocks) == 4


def test_slots_share_no_block_that_is_too_small_for_two() -> None:
    pool = StagingPool(config(peers=1, slots=4))
    slots = cut(pool.lend("a"), slot_bytes=BLOCK // 2 + 1)
    assert len(slots) == 4 and pool.lent_bytes == 4 * BLOCK


@pytest.mark.parametrize(("slots", "least"), [(1, 1), (4, BLOCK // 2 + 1)])
def test_the_only_block_is_not_cut_when_halves_are_of_no_use(slots: int, least: int) -> None:
    pool = StagingPool(config(peers=2, slots=slots, least=least))
    pool.lend("a")
    assert pool.lend("b").slot_bytes == BLOCK


def test_block_stays_lent_while_somebody_refers_to_its_slot() -> None:
    pool = StagingPool(config(peers=2, slots=3))
    lease = pool.lend("a")
    slots = cut(lease)
    kept = slots[1]
    lease.close()
    assert pool.lent_bytes == 3 * BLOCK
    del slots
    assert pool.lent_bytes == BLOCK
    again = cut(pool.lend("a"))
    assert kept.tensor.data_ptr() not in {slot.tensor.data_ptr() for slot in again}
    del kept
    assert pool.lent_bytes == 3 * BLOCK


def test_channel_that_comes_again_waits_for_what_it_had_before() -> None:
    pool = StagingPool(config(peers=8, slots=4))
    older = pool.lend("a")
    begun = threading.Event()

    def end() -> None:
        begun.wait(5.0)
        older.close()

    ending = threading.Thread(target=end)
    ending.start()
    begun.set()
    assert len(pool.lend("a", 5.0).blocks) == 4
    ending.join()
    assert older.blocks == []


def test_wait_for_memory_is_bounded() -> None:
    pool = StagingPool(config(peers=1, slots=1))
    held = pool.lend("a")
    began = time.monotonic()
    with pytest.raises(PhloemError):
        pool.lend("b", 0.05)
    assert 0.05 <= time.monotonic() - began < 2.0
    assert held.blocks


def test_nothing_is_lost_over_many_leases_without_the_garbage_collector() -> None:
    pool = StagingPool(config(peers=3, slots=4))
    gc.disable()
    try:
        for n in range(200):
            leases = [pool.lend(f"{n}.{m}") for m in range(3)]
            slots = [cut(lease) for lease in leases]
            assert sum(len(own) for own in slots) == 8
            for lease in leases:
                lease.close()
            del slots
            assert pool.lent_bytes == 0
    finally:
        gc.enable()

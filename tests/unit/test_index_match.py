"""The lookup of a chain, against brute force."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from phloem.services.cache_index.match import READ_WHOLE, STRIDE, matching


def run(bitmaps: Sequence[int], live_mask: int) -> tuple[dict[int, int], list[Sequence[int]]]:
    """(the answer, the indices of each read)."""
    reads: list[Sequence[int]] = []
    steps = matching(len(bitmaps), live_mask)
    try:
        wanted = next(steps)
        while True:
            reads.append(wanted)
            wanted = steps.send([bitmaps[index] for index in wanted])
    except StopIteration as done:
        return done.value, reads


def bitmaps_of(num_blocks: int, lengths: dict[int, int]) -> list[int]:
    return [sum(1 << slot for slot, k in lengths.items() if index < k) for index in range(num_blocks)]


@st.composite
def chains(draw: st.DrawFn) -> tuple[int, dict[int, int], int]:
    num_blocks = draw(st.integers(0, 200))
    edge = st.sampled_from([0, 1, STRIDE - 1, STRIDE, STRIDE + 1, READ_WHOLE, READ_WHOLE + 1, num_blocks])
    length = st.one_of(st.integers(0, num_blocks), edge.map(lambda k: min(k, num_blocks)))
    lengths = draw(st.dictionaries(st.integers(0, 70), length, max_size=12))
    return num_blocks, lengths, draw(st.integers(0, (1 << 71) - 1))


@given(chains())
def test_lengths_equal_brute_force_for_live_slots(case: tuple[int, dict[int, int], int]) -> None:
    num_blocks, lengths, live_mask = case
    answer, _ = run(bitmaps_of(num_blocks, lengths), live_mask)
    assert answer == {slot: k for slot, k in lengths.items() if k > 0 and live_mask >> slot & 1}


@given(chains())
def test_at_most_two_reads_and_no_block_twice(case: tuple[int, dict[int, int], int]) -> None:
    num_blocks, lengths, live_mask = case
    _, reads = run(bitmaps_of(num_blocks, lengths), live_mask)
    assert len(reads) <= 2
    read = [index for indices in reads for index in indices]
    assert len(read) == len(set(read))


def test_long_chain_of_one_holder_reads_a_sixteenth_and_one_stretch() -> None:
    _, reads = run(bitmaps_of(2048, {3: 1000}), 1 << 3)
    assert [len(indices) for indices in reads] == [2048 // STRIDE, STRIDE - 1]


def test_fully_held_chain_needs_one_read() -> None:
    answer, reads = run(bitmaps_of(2048, {3: 2048}), 1 << 3)
    assert answer == {3: 2048}
    assert len(reads) == 1


def test_nothing_is_read_when_nobody_lives() -> None:
    assert run(bitmaps_of(100, {3: 50}), 0) == ({}, [])

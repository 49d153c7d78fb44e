"""How a prefill step's layers are cut into groups that are sent while the rest computes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phloem.shared.engine.layer_groups import (
    PIECE_OVERHEAD_S,
    PrefillStep,
    layer_groups,
    next_piece_bytes,
)

MIB = 2**20


def llama(num_tokens: int, tokens_per_s: float = 38_000.0, bytes_per_s: float = 256e9) -> PrefillStep:
    """Llama-3.1-8B: 32 layers of 4 KiB a token."""
    return PrefillStep(32, num_tokens * 4096, num_tokens, tokens_per_s, bytes_per_s)


def test_long_prompt_goes_in_groups_of_a_hundred_mib_and_its_last_layer_alone() -> None:
    assert layer_groups(llama(8192)) == [4, 8, 12, 16, 20, 24, 28, 31, 32]
    assert layer_groups(llama(4096)) == [8, 16, 24, 31, 32]


def test_short_prompt_goes_as_one_group() -> None:
    assert layer_groups(llama(512)) == [32]


def test_before_anything_was_measured_there_are_groups_too() -> None:
    ends = layer_groups(llama(8192, tokens_per_s=0.0, bytes_per_s=0.0))
    assert len(ends) > 2 and ends[-2:] == [31, 32]


def test_slow_link_has_smaller_groups() -> None:
    assert len(layer_groups(llama(8192, bytes_per_s=25e9))) > len(layer_groups(llama(8192)))


def test_fast_prefill_leaves_more_layers_to_hide_the_group_before_them() -> None:
    ends = layer_groups(llama(8192, tokens_per_s=4e6, bytes_per_s=256e9))
    assert ends[-1] - ends[-2] > 1


@given(
    num_layers=st.integers(1, 130),
    bytes_per_layer=st.integers(1, 2**32),
    num_tokens=st.integers(1, 100_000),
    tokens_per_s=st.one_of(st.just(0.0), st.floats(1.0, 1e8)),
    bytes_per_s=st.one_of(st.just(0.0), st.floats(1e6, 1e12)),
)
def test_groups_cover_all_layers_in_order_and_none_but_the_last_two_is_small(
    num_layers: int, bytes_per_layer: int, num_tokens: int, tokens_per_s: float, bytes_per_s: float
) -> None:
    ends = layer_groups(PrefillStep(num_layers, bytes_per_layer, num_tokens, tokens_per_s, bytes_per_s))
    assert ends == sorted(set(ends)) and ends[-1] == num_layers and ends[0] > 0
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    seconds = [size * bytes_per_layer / (bytes_per_s or 64e9) for size in sizes]
    assert all(each >= 10 * PIECE_OVERHEAD_S * (1 - 1e-9) for each in seconds[:-2])
    assert sizes[-1] <= max(sizes[0], 1) or len(sizes) == 1


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_few_layers(num_layers: int) -> None:
    assert layer_groups(PrefillStep(num_layers, 1024 * MIB, 8192, 1e4, 1e9))[-1] == num_layers


def pieces_of(total: int, slot: int) -> list[int]:
    left, made = total, [0]
    while left:
        made.append(next_piece_bytes(left, slot, made[-1]))
        left -= made[-1]
        assert left >= 0
    return made[1:]


@pytest.mark.parametrize(
    ("total", "slot", "pieces"),
    [
        (10, 128, [10]),
        (52, 128, [52]),
        (64, 128, [36, 28]),
        (256, 128, [36, 108, 89, 22]),
        (512, 128, [36, 108, 128, 128, 89, 22]),
        (330, 128, [36, 108, 128, 42, 16]),
        (100, 32, [32, 32, 32, 4]),
    ],
)
def test_pieces_grow_are_large_and_end_with_a_small_one(total: int, slot: int, pieces: list[int]) -> None:
    assert [piece // MIB for piece in pieces_of(total * MIB, slot * MIB)] == pieces


@given(total=st.integers(1, 2**31), slot=st.integers(2**20, 2**28))
def test_no_piece_is_larger_than_its_slot_or_grows_faster_than_pages_are_gathered(
    total: int, slot: int
) -> None:
    pieces = pieces_of(total, slot)
    assert sum(pieces) == total and all(0 < piece <= slot for piece in pieces)
    assert all(after <= 3 * before for before, after in itertools.pairwise(pieces))

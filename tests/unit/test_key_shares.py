"""Every key of every row is read by one block, and no block reads much more than the others."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given
from hypothesis import strategies as st

from phloem.kernels.flashinfer_ops.page_lists import PagedRows
from phloem.kernels.triton_ops.key_shares import FIELDS, make_items, num_items, share_size
from phloem.shared.engine.decode_tables import DecodeTables

LENGTHS = st.lists(st.integers(1, 40_000), min_size=1, max_size=80)


def items_of(lengths: list[int], num_kv_heads: int) -> npt.NDArray[np.int32]:
    """With slots 100 and up."""
    work = np.full((num_items(len(lengths), num_kv_heads), FIELDS), 99, dtype=np.int32)
    kv_lens = np.array(lengths)
    make_items(100 + np.arange(len(lengths)), kv_lens, share_size(kv_lens, num_kv_heads), work)
    return work[work[:, 0] >= 0]


@given(LENGTHS, st.sampled_from([1, 2, 8, 32]))
def test_each_key_is_read_once(lengths: list[int], num_kv_heads: int) -> None:
    read = [0] * len(lengths)
    for index, (row, slot, position, begin, end, first, count, _) in enumerate(
        items_of(lengths, num_kv_heads).tolist()
    ):
        assert (slot, position, begin) == (100 + row, lengths[row] - 1, read[row])
        is_last = index == first + count - 1
        read[row] = end + 1 if is_last else end  # the last one has the new token, too
    assert read == lengths


def test_one_long_row_among_short_ones_is_cut() -> None:
    items = items_of([1_100] * 32 + [8_200], 8)
    assert int((items[:, 4] - items[:, 3]).max()) <= 1_280


def test_equal_rows_that_fill_the_device_are_not_cut() -> None:
    assert len(items_of([1_100] * 64, 8)) == 64


def test_tables_hold_the_steps_work() -> None:
    tables = DecodeTables(torch.device("cpu"), num_slots=4, max_pages=80, page_size=16, num_kv_heads=2)
    table = np.arange(320, dtype=np.int32).reshape(4, 80)
    for lengths in ([700, 3, 1_200], [701, 4, 1_201], [5]):
        slots, kv_lens = np.arange(len(lengths)), np.array(lengths)
        found = np.zeros((tables.num_items(len(lengths)), FIELDS), dtype=np.int32)
        pairs = np.zeros((100, 2), dtype=np.int32)
        tables.write(PagedRows(table, slots, np.ones_like(slots), kv_lens), found, pairs)
        expected = np.zeros((num_items(len(lengths), 2), FIELDS), dtype=np.int32)
        make_items(slots, kv_lens, share_size(kv_lens, 2), expected)
        assert (found == expected).all()


def test_more_pages_than_travel_with_a_step_are_there_all_the_same() -> None:
    tables = DecodeTables(torch.device("cpu"), num_slots=4, max_pages=80, page_size=16, num_kv_heads=2)
    table = np.arange(320, dtype=np.int32).reshape(4, 80)
    work = np.zeros((tables.num_items(3), FIELDS), dtype=np.int32)
    pairs = np.zeros((4, 2), dtype=np.int32)
    slots, kv_lens = np.arange(1, 4), np.array([16, 33, 80])
    rows = PagedRows(table, slots, np.ones_like(slots), kv_lens)
    assert tables.write(rows, work, pairs) == 0
    for slot, num_pages in zip((1, 2, 3), (1, 3, 5), strict=True):
        assert (tables.page_table[slot, :num_pages].numpy() == table[slot, :num_pages]).all()
    assert tables.page_table[1:, 5:].sum() == 0
    assert tables.write(rows._replace(kv_lens=kv_lens + 1), work, pairs) == 2, "of rows at the end of a page"
    assert pairs[:2].tolist() == [[81, 81], [245, 245]]

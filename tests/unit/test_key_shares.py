"""Every key of every row is read by one block, and no block reads much more than the others."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from phloem.kernels.flashinfer_ops.page_lists import PagedRows
from phloem.kernels.triton_ops.key_shares import num_items, share_keys
from phloem.shared.engine.decode_tables import DecodeTables
from phloem.shared.engine.page_mirror import PageMirror

LENGTHS = st.lists(st.integers(1, 40_000), min_size=1, max_size=80)


@given(LENGTHS, st.sampled_from([1, 2, 8, 32]))
def test_each_key_is_read_once(lengths: list[int], num_kv_heads: int) -> None:
    work = share_keys(np.array(lengths), num_kv_heads)
    share, firsts, items = int(work[0]), work[1 : 1 + len(lengths)], work[1 + len(lengths) :]
    assert len(items) == num_items(len(lengths), num_kv_heads)
    read = [0] * len(lengths)
    for index, row in enumerate(items.tolist()):
        if row >= 0:
            assert (index - int(firsts[row])) * share == read[row]
            read[row] += min(share, lengths[row] - read[row])
    assert read == lengths


def test_one_long_row_among_short_ones_is_cut() -> None:
    work = share_keys(np.array([1_100] * 32 + [8_200]), 8)
    assert 512 <= int(work[0]) <= 1_152


def test_equal_rows_that_fill_the_device_are_not_cut() -> None:
    work = share_keys(np.array([1_100] * 64), 8)
    assert int((work[65:] >= 0).sum()) == 64


def test_tables_hold_the_steps_work() -> None:
    pages = PageMirror(torch.device("cpu"), num_slots=4, max_pages=80, page_size=16)
    tables = DecodeTables(pages, torch.device("cpu"), max_rows=4, num_kv_heads=2)
    table = np.arange(320, dtype=np.int32).reshape(4, 80)
    for lengths in ([700, 3, 1_200], [701, 4, 1_201], [5]):
        slots, kv_lens = np.arange(len(lengths)), np.array(lengths)
        tables.update(PagedRows(table, slots, np.ones_like(slots), kv_lens))
        assert tables.work(len(lengths)).tolist() == share_keys(kv_lens, 2).tolist()
        assert tables.page_table[slots[-1], 0] == table[slots[-1], 0]

"""Page lists that go on from the step before are those that would be gathered anew, on the device too."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.kernels.flashinfer_ops.page_lists import PagedRows, PageLists

CPU = torch.device("cpu")
MAX_PAGES = 24


def expected(rows: PagedRows, page_size: int) -> tuple[list[int], list[int], list[int]]:
    """kv_indptr, last_page_len and page ids, row by row."""
    indptr, last, pages = [0], [], []
    for slot, kv_len in zip(rows.slots.tolist(), rows.kv_lens.tolist(), strict=True):
        count = -(-kv_len // page_size)
        indptr.append(indptr[-1] + count)
        last.append(kv_len - (count - 1) * page_size)
        pages += rows.page_table[slot, :count].tolist()
    return indptr, last, pages


def assert_describe(lists: PageLists, rows: PagedRows, page_size: int) -> None:
    indptr, last, pages = expected(rows, page_size)
    assert lists.device_qo_indptr.tolist() == [0, *np.cumsum(rows.query_lens).tolist()]
    assert lists.device_kv_indptr.tolist() == indptr == lists.kv_indptr.tolist()
    assert lists.device_last_page_len.tolist() == last
    assert lists.device_indices[: len(pages)].tolist() == pages
    assert lists.kv_lens.tolist() == rows.kv_lens.tolist()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_lists_follow_rows_that_grow(data: st.DataObject) -> None:
    page_size = data.draw(st.sampled_from([1, 2, 4]))
    num_slots = data.draw(st.integers(1, 6))
    table = np.random.default_rng(0).permutation(num_slots * MAX_PAGES).astype(np.int32)
    table = table.reshape(num_slots, MAX_PAGES)
    lists = PageLists(CPU, page_size=page_size, max_rows=num_slots, max_indices=num_slots * MAX_PAGES)
    for _ in range(data.draw(st.integers(1, 3))):
        slots = np.array(data.draw(st.permutations(range(num_slots))))[: data.draw(st.integers(1, num_slots))]
        longest = MAX_PAGES * page_size
        kv_lens = np.array([data.draw(st.integers(1, longest)) for _ in slots])
        rows = PagedRows(table, slots, np.ones(len(slots), dtype=np.int64), kv_lens)
        assert lists.update(rows)
        assert_describe(lists, rows, page_size)
        for step in data.draw(st.lists(st.integers(1, 3), max_size=8)):
            before = -(-kv_lens // page_size)
            kv_lens = np.minimum(kv_lens + step, longest)
            rows = PagedRows(table, slots, rows.query_lens, kv_lens, same_rows=True)
            assert lists.update(rows) == bool((before != -(-kv_lens // page_size)).any())
            assert_describe(lists, rows, page_size)


def test_chunks_have_their_query_lengths() -> None:
    table = np.arange(2 * MAX_PAGES, dtype=np.int32).reshape(2, MAX_PAGES)
    lists = PageLists(CPU, page_size=4, max_rows=2, max_indices=2 * MAX_PAGES)
    rows = PagedRows(table, np.array([1, 0]), np.array([5, 3]), np.array([9, 3]))
    lists.update(rows)
    assert_describe(lists, rows, 4)


def test_plans_before_stay_as_they_were_while_the_next_is_made() -> None:
    """Step N + 1 is planned while N's lists may still be on their way."""
    table = np.arange(MAX_PAGES, dtype=np.int32).reshape(1, MAX_PAGES)
    lists = PageLists(CPU, page_size=1, max_rows=1, max_indices=MAX_PAGES)
    ones = np.ones(1, dtype=np.int64)
    lists.update(PagedRows(table, np.array([0]), ones, np.array([3])))
    sent = lists._lists[lists._lists_turn]
    content = sent[:3].tolist()
    lists.update(PagedRows(table, np.array([0]), ones, np.array([4]), same_rows=True))
    assert sent[:3].tolist() == content and lists._lists[lists._lists_turn] is not sent

"""The page table on the device equals the host's for every row of a step, whatever came before.

The device's is what the pairs make of it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from phloem.kernels.flashinfer_ops.page_lists import PagedRows
from phloem.shared.engine.page_mirror import PageMirror

NUM_SLOTS, MAX_PAGES, PAGE_SIZE = 5, 6, 4


class Host:
    """A page table as the engine keeps it: slots get other requests, rows grow."""

    def __init__(self) -> None:
        self.table = np.zeros((NUM_SLOTS, MAX_PAGES), dtype=np.int32)
        self.lengths = np.ones(NUM_SLOTS, dtype=np.int64)
        self.next_page = 1

    def rebind(self, slot: int, length: int) -> None:
        self.lengths[slot] = length
        self.table[slot, : -(-length // PAGE_SIZE)] = self._pages(-(-length // PAGE_SIZE))

    def grow(self, slot: int) -> None:
        length = int(self.lengths[slot])
        if length % PAGE_SIZE == 0:
            self.table[slot, length // PAGE_SIZE] = self._pages(1)[0]
        self.lengths[slot] += 1

    def _pages(self, count: int) -> list[int]:
        self.next_page += count
        return list(range(self.next_page - count, self.next_page))


@given(st.data())
def test_equals_the_hosts_table(data: st.DataObject) -> None:
    host = Host()
    mirror = PageMirror(num_slots=NUM_SLOTS, max_pages=MAX_PAGES, page_size=PAGE_SIZE)
    table = np.zeros((NUM_SLOTS, MAX_PAGES), dtype=np.int32)
    slots = np.arange(NUM_SLOTS)
    for _ in range(data.draw(st.integers(1, 12))):
        same = data.draw(st.booleans()) and bool((host.lengths[slots] < MAX_PAGES * PAGE_SIZE).all())
        if same:
            for slot in slots.tolist():
                host.grow(slot)
        else:
            slots = np.array(data.draw(st.permutations(range(NUM_SLOTS)))[: data.draw(st.integers(1, 5))])
            for changed in data.draw(st.sets(st.sampled_from(slots.tolist()))):
                host.rebind(changed, data.draw(st.integers(1, MAX_PAGES * PAGE_SIZE)))
        kv_lens = host.lengths[slots]
        pairs = mirror.changes(PagedRows(host.table, slots, np.ones_like(slots), kv_lens, same_rows=same))
        assert (table.reshape(-1)[pairs[:, 0]] != pairs[:, 1]).all(), "only what is new travels"
        table.reshape(-1)[pairs[:, 0]] = pairs[:, 1]
        for row, length in enumerate(kv_lens.tolist()):
            slot, used = int(slots[row]), -(-length // PAGE_SIZE)
            assert table[slot, :used].tolist() == host.table[slot, :used].tolist()

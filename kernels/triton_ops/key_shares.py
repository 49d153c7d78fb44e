"""Which keys each block of the decode attention reads. Pure.

Rows of a step differ in length; the longest must not decide how long all wait. So the keys of all rows are
cut into shares of one size, such that there are about as many as keep the device busy. Each share is an item:

    work, int32 [num_items, 8]:   row, slot, position, begin, end, first item of the row, items of the row, 0

Keys [begin, end) are in their pages already; the row's new token, at `position`, belongs to its last item. A
row of -1 is no item.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Int64Array: TypeAlias = npt.NDArray[np.int64]

FIELDS = 8
_ROUND = 64  # keys


class Sharing(NamedTuple):
    """blocks: that should have an item, of all KV heads; least: keys of an item."""

    blocks: int
    least: int


MANY = Sharing(512, 128)  # keep a large device busy; shorter parts cost more to join than they save
ONE_EACH = Sharing(128, 64)  # where a block to each multiprocessor is all there is


def num_items(num_rows: int, num_kv_heads: int) -> int:
    """How many there are at most for so many rows: what a captured launch has blocks for."""
    return num_rows + _wanted(num_rows, num_kv_heads, MANY)


def share_size(kv_lens: Int64Array, num_kv_heads: int, sharing: Sharing = MANY) -> int:
    """Keys of a share, for rows with so many keys each, the new token's included."""
    even = -(-int(kv_lens.sum()) // _wanted(len(kv_lens), num_kv_heads, sharing))
    return max(sharing.least, -(-even // _ROUND) * _ROUND)


def make_items(slots: Int64Array, kv_lens: Int64Array, share: int, out: npt.NDArray[np.int32]) -> None:
    """Writes the items of rows cut into shares of so many keys. out: int32 `[num_items, FIELDS]`."""
    counts = -(-kv_lens // share)
    firsts = np.cumsum(counts) - counts
    rows = np.repeat(np.arange(len(kv_lens)), counts)
    count = len(rows)
    begins = (np.arange(count) - firsts[rows]) * share
    positions = (kv_lens - 1)[rows]
    items = out[:count]
    items[:, 0], items[:, 1], items[:, 2] = rows, slots[rows], positions
    items[:, 3], items[:, 4] = begins, np.minimum(begins + share, positions)
    items[:, 5], items[:, 6] = firsts[rows], counts[rows]
    out[count:, 0] = -1


def _wanted(num_rows: int, num_kv_heads: int, sharing: Sharing) -> int:
    return max(num_rows, sharing.blocks // num_kv_heads)

"""Which keys each block of the decode attention reads. Pure.

Rows of a step differ in length; the longest must not decide how long all wait. So the keys of all rows are
cut into shares of one size, such that there are about as many as keep the device busy:

    work (int32):  [ share | first item of each row ... | row of each item ..., -1 where there is none ]
                       1               B                              num_items(B)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_BLOCKS = 512  # that keep a large device busy, of all KV heads
_ROUND = 64  # keys
_LEAST = 128  # shorter parts cost more to join than they save


def num_items(num_rows: int, num_kv_heads: int) -> int:
    """How many there are at most for so many rows: what a captured launch has blocks for."""
    return num_rows + _wanted(num_rows, num_kv_heads)


def share_keys(kv_lens: npt.NDArray[np.int64], num_kv_heads: int) -> npt.NDArray[np.int32]:
    """The work of rows with so many keys each, the new token's included."""
    num_rows = len(kv_lens)
    even = -(-int(kv_lens.sum()) // _wanted(num_rows, num_kv_heads))
    share = max(_LEAST, -(-even // _ROUND) * _ROUND)
    counts = -(-kv_lens // share)
    work = np.full(1 + num_rows + num_items(num_rows, num_kv_heads), -1, dtype=np.int32)
    work[0] = share
    work[1] = 0
    np.cumsum(counts[:-1], out=work[2 : num_rows + 1])
    items = np.repeat(np.arange(num_rows, dtype=np.int32), counts)
    work[1 + num_rows : 1 + num_rows + len(items)] = items
    return work


def _wanted(num_rows: int, num_kv_heads: int) -> int:
    return max(num_rows, _BLOCKS // num_kv_heads)

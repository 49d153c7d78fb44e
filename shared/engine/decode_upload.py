"""All that a captured decode step reads of the host: one pinned buffer, one copy.

    [ rows (`cuda_inputs.py`) | header | work | pairs ... ]       for one number of rows always at one place

header: int32 [number of pairs, turn, 0, 0]: the turn says where the step's tokens go (`step_results.py`).
work, pairs: what `DecodeTables` writes; empty without the decode kernels. The pairs are last, so that as many
travel as there are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phloem.kernels.triton_ops.key_shares import FIELDS
from phloem.shared.engine.cuda_inputs import (
    HostRows,
    PinnedRing,
    RowInputs,
    Send,
    device_rows,
    host_rows,
    num_row_words,
)
from phloem.shared.engine.decode_tables import DecodeTables

MAX_PAIRS = 16_384
_HEADER_WORDS = 2
_PAIRS_ROUND = 64  # so many at a time: few different lengths of copies
_MAX_REMEMBERED = 1024

Int32Array = npt.NDArray[np.int32]


class DecodeInputs(NamedTuple):
    """Views of the device buffer: header int32 `[4]`, work int32 `[num_items, FIELDS]`, pairs int32
    `[capacity, 2]`."""

    rows: RowInputs
    header: Tensor
    work: Tensor
    pairs: Tensor


class HostDecode(NamedTuple):
    """The same on the host, to be filled."""

    rows: HostRows
    header: Int32Array
    work: Int32Array
    pairs: Int32Array


class DecodeUpload:
    """`host` before each step, then `send`. The device's views of one size stay at their addresses."""

    def __init__(self, device: torch.device, max_rows: int, tables: DecodeTables | None, send: Send) -> None:
        self._tables = tables
        self._capacity = MAX_PAIRS if tables is not None else 0
        self._ring = PinnedRing(self._pairs_at(max_rows) + self._capacity, device, send)
        self._hosts: dict[tuple[int, int], HostDecode] = {}
        self._views: dict[int, DecodeInputs] = {}

    @property
    def turn(self) -> int:
        """Which of `RING` buffers `host` gave last."""
        return self._ring.turn

    def host(self, size: int) -> HostDecode:
        """The next host buffer, for `size` rows."""
        buffer = self._ring.next()
        found = self._hosts.get((self._ring.turn, size))
        if found is None:
            header, work, pairs = (section.numpy() for section in self._sections(buffer, size))
            found = HostDecode(host_rows(buffer, size), header, work, pairs)
            if len(self._hosts) < _MAX_REMEMBERED:
                self._hosts[self._ring.turn, size] = found
        return found

    def send(self, size: int, num_pairs: int) -> DecodeInputs:
        """Sends what `host(size)` gave, with so many pairs, to the device; returns at once."""
        rounded = min(self._capacity, -(-num_pairs // _PAIRS_ROUND) * _PAIRS_ROUND)
        self._ring.send(self._pairs_at(size) + rounded)
        return self.views(size)

    def views(self, size: int) -> DecodeInputs:
        found = self._views.get(size)
        if found is None:
            buffer = self._ring.buffer
            found = DecodeInputs(device_rows(buffer, size), *self._sections(buffer, size))
            if len(self._views) < _MAX_REMEMBERED:
                self._views[size] = found
        return found

    # -- inside ----------------------------------------------------------------------------------------

    def _num_items(self, size: int) -> int:
        return self._tables.num_items(size) if self._tables is not None else 0

    def _pairs_at(self, size: int) -> int:
        """The word at which the pairs begin: behind rows, header and work."""
        return num_row_words(size) + _HEADER_WORDS + self._num_items(size) * FIELDS // 2

    def _sections(self, buffer: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Header, work and pairs of a buffer of 8-byte words."""
        header_at, pairs_at = num_row_words(size), self._pairs_at(size)
        work_at = header_at + _HEADER_WORDS
        return (
            buffer[header_at:work_at].view(torch.int32),
            buffer[work_at:pairs_at].view(torch.int32).view(-1, FIELDS),
            buffer[pairs_at : pairs_at + self._capacity].view(torch.int32).view(-1, 2),
        )

"""A step's inputs on their way to the device: one pinned host buffer, one copy, never waited for.

Steps take turns on a ring of pinned buffers: by the time that one is filled again, the step that read it
has been collected.

    buffer for `count` entries:  [ slot | token | ... int64 each ][ temperature | ... float32 each ]
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

RING = 3  # steps that may be launched and not collected: 2, and the one being filled

_INT_FIELDS = ("slot", "token", "position", "write_index", "seed", "sample_position", "top_k")
_FLOAT_FIELDS = ("temperature", "top_p", "min_p")
_MAX_REMEMBERED = 512  # views by count: one per batch size


class RowInputs(NamedTuple):
    """Views of the device buffers, each `[n]`: one entry per row (or per token, in a prompt step).

    `token` is -1 where the slot's last sampled token is the input.
    """

    slot: Tensor
    token: Tensor
    position: Tensor
    write_index: Tensor
    seed: Tensor
    sample_position: Tensor
    top_k: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor


class HostRows(NamedTuple):
    """The same on the host, to be filled."""

    slot: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    write_index: npt.NDArray[np.int64]
    seed: npt.NDArray[np.int64]
    sample_position: npt.NDArray[np.int64]
    top_k: npt.NDArray[np.int64]
    temperature: npt.NDArray[np.float32]
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]


class InputRing:
    """A device buffer of a fixed capacity and the host ring (pinned for CUDA) that fills it.

    For one `count` the device views are always at the same addresses, so that a CUDA graph may read them;
    the copies are ordered on the current stream, behind the step before.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self._buffer = torch.zeros(_num_words(capacity), dtype=torch.int64, device=device)
        self._hosts = [
            torch.zeros(_num_words(capacity), dtype=torch.int64, pin_memory=device.type == "cuda")
            for _ in range(RING)
        ]
        self._turn = 0
        self._host_views: dict[tuple[int, int], HostRows] = {}
        self._device_views: dict[int, RowInputs] = {}

    def host(self, count: int) -> HostRows:
        """The next host buffer: `count` entries of each field."""
        self._turn = (self._turn + 1) % RING
        views = self._host_views.get((self._turn, count))
        if views is None:
            ints, floats = _split(self._hosts[self._turn], count)
            views = HostRows(*ints.numpy(), *floats.numpy())
            if len(self._host_views) < _MAX_REMEMBERED:
                self._host_views[self._turn, count] = views
        return views

    def upload(self, count: int) -> RowInputs:
        """Sends what `host(count)` gave to the device; returns at once."""
        words = _num_words(count)
        self._buffer[:words].copy_(self._hosts[self._turn][:words], non_blocking=True)
        views = self._device_views.get(count)
        if views is None:
            ints, floats = _split(self._buffer, count)
            views = RowInputs(*ints.unbind(0), *floats.unbind(0))
            if len(self._device_views) < _MAX_REMEMBERED:
                self._device_views[count] = views
        return views


def _num_words(count: int) -> int:
    """8-byte words of `count` entries."""
    return len(_INT_FIELDS) * count + -(-len(_FLOAT_FIELDS) * count // 2)


def _split(buffer: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The integer fields `[7, count]` and the float fields `[3, count]`."""
    num_ints = len(_INT_FIELDS) * count
    floats = buffer[num_ints : _num_words(count)].view(torch.float32)
    return buffer[:num_ints].view(-1, count), floats[: len(_FLOAT_FIELDS) * count].view(-1, count)

"""A step's inputs on their way to the device: one pinned host buffer, one copy, never waited for.

Steps take turns on a ring of pinned buffers: by the time that one is filled again, the step that read it
has been collected.

    rows, for `count` entries:  [ slot | token | ... int64 each ][ temperature | ... float32 each ]

Fields are as long as the next multiple of 16 entries, so that they begin at aligned addresses: a kernel is
compiled anew for arguments that do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

RING = 3  # steps that may be launched and not collected: 2, and the one being filled

_INT_FIELDS = ("slot", "token", "position", "write_index", "seed", "sample_position", "top_k")
_FLOAT_FIELDS = ("temperature", "top_p", "min_p")
_ROUND = 16  # entries
_MAX_REMEMBERED = 512  # views by count: one per batch size

Send: TypeAlias = Callable[[Tensor, Tensor], None]  # `DeviceCalls.send`


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


class PinnedRing:
    """A device buffer of 8-byte words and the host buffers (pinned for CUDA) that fill it in turns.

    What is in the buffer stays at its addresses, so that a CUDA graph may read it; copies are ordered on the
    current stream, behind the step before.
    """

    def __init__(self, num_words: int, device: torch.device, send: Send) -> None:
        self._send = send
        self.buffer = torch.zeros(num_words, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(num_words, dtype=torch.int64, pin_memory=pinned) for _ in range(RING)]
        self._copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by turn and length: to, from
        self.turn = 0

    def next(self) -> Tensor:
        """The host buffer whose turn it is."""
        self.turn = (self.turn + 1) % RING
        return self._hosts[self.turn]

    def send(self, num_words: int) -> None:
        """Sends the beginning of what `next` gave; returns at once."""
        copy = self._copies.get((self.turn, num_words))
        if copy is None:
            copy = self.buffer[:num_words], self._hosts[self.turn][:num_words]
            if len(self._copies) < _MAX_REMEMBERED:
                self._copies[self.turn, num_words] = copy
        self._send(*copy)


class InputRing:
    """Rows alone, of any number up to a capacity."""

    def __init__(self, capacity: int, device: torch.device, send: Send) -> None:
        self._ring = PinnedRing(num_row_words(capacity), device, send)
        self._host_views: dict[tuple[int, int], HostRows] = {}
        self._device_views: dict[int, RowInputs] = {}

    def host(self, count: int) -> HostRows:
        """The next host buffer: `count` entries of each field."""
        buffer = self._ring.next()
        views = self._host_views.get((self._ring.turn, count))
        if views is None:
            views = host_rows(buffer, count)
            if len(self._host_views) < _MAX_REMEMBERED:
                self._host_views[self._ring.turn, count] = views
        return views

    def upload(self, count: int) -> RowInputs:
        """Sends what `host(count)` gave to the device; returns at once."""
        self._ring.send(num_row_words(count))
        views = self._device_views.get(count)
        if views is None:
            views = device_rows(self._ring.buffer, count)
            if len(self._device_views) < _MAX_REMEMBERED:
                self._device_views[count] = views
        return views


def num_row_words(count: int) -> int:
    """8-byte words of `count` entries."""
    return (2 * len(_INT_FIELDS) + len(_FLOAT_FIELDS)) * _stride(count) // 2


def device_rows(buffer: Tensor, count: int) -> RowInputs:
    """The rows at the beginning of a buffer of 8-byte words."""
    ints, floats = _split(buffer, count)
    return RowInputs(*ints.unbind(0), *floats.unbind(0))


def host_rows(buffer: Tensor, count: int) -> HostRows:
    ints, floats = _split(buffer, count)
    return HostRows(*ints.numpy(), *floats.numpy())


def _stride(count: int) -> int:
    return -(-count // _ROUND) * _ROUND


def _split(buffer: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The integer fields `[7, count]` and the float fields `[3, count]`."""
    stride = _stride(count)
    num_ints = len(_INT_FIELDS) * stride
    floats = buffer[num_ints : num_row_words(count)].view(torch.float32)
    return buffer[:num_ints].view(-1, stride)[:, :count], floats.view(-1, stride)[:, :count]

"""A step's inputs on their way to the GPU: pinned host buffers, one copy each, never waited for.

Steps take turns on a ring of pinned buffers: by the time that one is filled again, the step that read it
has been collected.
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
    """Device buffers of a fixed capacity and the pinned ring that fills them.

    For one `count` the device views are always at the same addresses, so that a CUDA graph may read them;
    the copies are ordered on the current stream, behind the step before.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        ints, floats = len(_INT_FIELDS) * capacity, len(_FLOAT_FIELDS) * capacity
        self._ints = torch.zeros(ints, dtype=torch.int64, device=device)
        self._floats = torch.zeros(floats, dtype=torch.float32, device=device)
        self._pinned_ints = [torch.zeros(ints, dtype=torch.int64, pin_memory=True) for _ in range(RING)]
        self._pinned_floats = [torch.zeros(floats, dtype=torch.float32, pin_memory=True) for _ in range(RING)]
        self._turn = 0

    def host(self, count: int) -> HostRows:
        """The next pinned buffers: `count` entries of each field."""
        self._turn = (self._turn + 1) % RING
        ints = self._pinned_ints[self._turn].numpy()[: len(_INT_FIELDS) * count]
        floats = self._pinned_floats[self._turn].numpy()[: len(_FLOAT_FIELDS) * count]
        return HostRows(*ints.reshape(-1, count), *floats.reshape(-1, count))

    def upload(self, count: int) -> RowInputs:
        """Sends what `host(count)` gave to the device; returns at once."""
        ints, floats = len(_INT_FIELDS) * count, len(_FLOAT_FIELDS) * count
        self._ints[:ints].copy_(self._pinned_ints[self._turn][:ints], non_blocking=True)
        self._floats[:floats].copy_(self._pinned_floats[self._turn][:floats], non_blocking=True)
        return self.device(count)

    def device(self, count: int) -> RowInputs:
        ints = self._ints[: len(_INT_FIELDS) * count].view(-1, count)
        floats = self._floats[: len(_FLOAT_FIELDS) * count].view(-1, count)
        return RowInputs(*ints.unbind(0), *floats.unbind(0))

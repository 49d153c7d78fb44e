"""What a runner asks of CUDA itself: to copy, to capture and replay, and to say what is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Captured(Protocol):
    """Launches that were captured once. `logits` is where each replay leaves what the capture returned: it is
    there until something else is replayed."""

    @property
    def logits(self) -> Tensor: ...

    def replay(self) -> None: ...


class Mark(Protocol):
    """A place in the stream of launches; `torch.cuda.Event`."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...


class DeviceCalls(Protocol):
    """`CudaCalls`, or what stands in for it where there is no GPU."""

    def send(self, target: Tensor, source: Tensor) -> None:
        """Copies pinned memory to the device, behind what was launched; returns at once."""

    def capture(self, forward: Callable[[], Tensor]) -> Captured: ...

    def mark(self) -> Mark: ...


class _Graph:
    def __init__(self, graph: torch.cuda.CUDAGraph, logits: Tensor) -> None:
        self.replay = graph.replay
        self.logits = logits


class CudaCalls:
    """Graphs that share one pool of memory, results included: only one of them is replayed at a time, and
    what it leaves is read before the next one. Capture the largest first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # torch's name for it

    def send(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def capture(self, forward: Callable[[], Tensor]) -> Captured:
        """Runs `forward` once, which compiles its kernels, then captures it."""
        forward()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = forward()
        self._pool = graph.pool()
        return _Graph(graph, _unowned(logits))

    def mark(self) -> Mark:
        event: Mark = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's stubs
        return event


class _Place:
    """Memory that somebody else owns, for `torch.as_tensor`: CUDA Array Interface, version 2."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": "<f4",
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }


def _unowned(tensor: Tensor) -> Tensor:
    """The same memory, which others may be given all the same: the graph's pool keeps it, and one graph's
    logits may lie where another's were."""
    return torch.as_tensor(_Place(tensor), device=tensor.device)

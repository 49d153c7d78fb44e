"""How much memory graphs, workspaces and the largest step take: found by doing it once, with a small pool.

The KV tensors' addresses are part of a CUDA graph, so the pool can't be sized after the capture. So the
runner is built twice: first over just enough pages for a largest step, to see what is left beside it, then
over the pool that fits. The second capture finds every kernel compiled and takes a second or two.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from phloem.shared.engine.memory import DeviceMemory


class MemoryGauge(Protocol):
    def read(self) -> DeviceMemory: ...

    def release(self) -> None:
        """Gives back what nobody references any more."""


class CudaGauge:
    """The memory of a CUDA device, as its driver and torch count it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def read(self) -> DeviceMemory:
        free, total = torch.cuda.mem_get_info(self._device)
        name = torch.cuda.get_device_name(self._device)
        return DeviceMemory(name, total, free, torch.cuda.memory_reserved(self._device))

    def release(self) -> None:
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


class HostGauge:
    """The memory of this machine."""

    def read(self) -> DeviceMemory:
        sizes = _meminfo()
        return DeviceMemory("this machine", sizes["MemTotal"], sizes["MemAvailable"], 0)

    def release(self) -> None:
        gc.collect()


def memory_gauge(device: torch.device) -> MemoryGauge:
    """Of where `device` keeps its tensors."""
    return CudaGauge(device) if device.type == "cuda" else HostGauge()


def _meminfo() -> dict[str, int]:
    """Bytes by name, as the kernel says them."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}


def measure_overhead(gauge: MemoryGauge, rehearse: Callable[[], object], pool_bytes: int) -> int:
    """Bytes that what `rehearse` returns holds, besides its pool of `pool_bytes`; it is dropped again.

    Counted from what is free before: what stays loaded for good (modules of kernels) counts, too.
    """
    gauge.release()
    before = gauge.read().free
    rehearsed = rehearse()
    held = before - gauge.read().free
    del rehearsed
    gauge.release()
    return max(0, held - pool_bytes)

"""What the device can do at best, measured in the same run as everything else."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

_GIB = 2**30


class Ceilings(NamedTuple):
    """read_bytes_per_s: a reduction over memory larger than the cache; flops_per_s: a large matrix product
    of random data in the model's dtype."""

    read_bytes_per_s: float
    flops_per_s: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Takes about a second on a GPU, and a few gigabytes for that long."""
    if device.type == "cuda":
        return Ceilings(_read_rate(device, 4 * _GIB), _matmul_rate(device, dtype, 8192))
    return Ceilings(_read_rate(device, _GIB // 2), _matmul_rate(device, dtype, 1024))


def _read_rate(device: torch.device, num_bytes: int) -> float:
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return num_bytes / _median_s(device, data.sum)


def _matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a = torch.randn(size, size, dtype=dtype, device=device)
    b = torch.randn(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _median_s(device, lambda: torch.mm(a, b))


def _median_s(device: torch.device, work: Callable[[], object], repeats: int = 12) -> float:
    for _ in range(3):
        work()
    return statistics.median(_timed_s(device, work) for _ in range(repeats))


def _timed_s(device: torch.device, work: Callable[[], object]) -> float:
    if device.type != "cuda":
        import time

        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3

"""How long launches take on the device, by themselves or replayed as a CUDA graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch


def event_ms(work: Callable[[], object], repeats: int) -> float:
    """The median of so many calls, by events between them."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    times = sorted(first.elapsed_time(last) for first, last in itertools.pairwise(events))
    return float(times[len(times) // 2])


def graph_ms(work: Callable[[], object], repeats: int = 12) -> float:
    """The median of so many replays, by events; `work` runs once before, which compiles its kernels."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    return event_ms(graph.replay, repeats)

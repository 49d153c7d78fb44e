"""What to say when the largest step, its graphs or its pages do not fit into a device's memory: pure."""

from __future__ import annotations

from typing import NamedTuple

from phloem.shared.engine.memory import MARGIN_BYTES, DeviceMemory, gb, out_of_memory, stop_others
from phloem.shared.engine.step_memory import (
    WORKSPACE_BYTES,
    StepCost,
    StepSizes,
    as_flags,
    fewer_graph_rows,
    lowered,
    rehearsal_pages,
    smaller_step,
    smallest_step,
)
from phloem.shared.errors import PhloemError


class Rehearsed(NamedTuple):
    """The pool of a rehearsal, whose pages the flags decide."""

    page_bytes: int
    page_size: int
    context_length: int

    def bytes_of(self, sizes: StepSizes) -> int:
        """With its scratch page."""
        return (rehearsal_pages(sizes, self.page_size, self.context_length) + 1) * self.page_bytes

    def with_pages(self, cost: StepCost) -> StepCost:
        """The costs of tokens and rows with those of their pages."""
        return cost._replace(
            per_token=cost.per_token + self.page_bytes // self.page_size,
            per_row=cost.per_row + self.page_bytes,
        )


def rehearsal_not_allocated(
    pool: Rehearsed, memory: DeviceMemory, sizes: StepSizes, cost: StepCost, channels: int
) -> PhloemError:
    """What to say when there is no memory for the pages that the largest step writes, which `sizes` decide,
    not `--mem-fraction-static`. What is advised has room for all that comes after them, too."""

    def need(sizes: StepSizes) -> int:
        return pool.bytes_of(sizes) + cost.of(sizes) + WORKSPACE_BYTES + channels + MARGIN_BYTES

    found = smaller_step(sizes, pool.with_pages(cost), lambda sizes: need(sizes) <= memory.free)
    return out_of_memory(
        f"the weights fit, but KV pages for a step of {sizes.chunk_tokens} tokens and {sizes.running} "
        f"requests, {gb(pool.bytes_of(sizes))}, could not be allocated: {gb(memory.free)} of {memory.name}'s "
        f"{gb(memory.total)} were free; {_advice(sizes, found, need(smallest_step(sizes)), memory)}",
        "chunked_prefill_size",
    )


def step_too_large(sizes: StepSizes, cost: StepCost, memory: DeviceMemory, *, rehearsed: bool) -> PhloemError:
    """What to say when memory ran out in the largest step at start; `memory` is as it was before the step.
    `rehearsed`: it had room once, beside a smaller pool."""
    found = smaller_step(sizes, cost, lambda sizes: cost.of(sizes) <= memory.free)
    advice = _advice(sizes, found, cost.of(smallest_step(sizes)), memory, share=_lower_share(rehearsed))
    return out_of_memory(
        f"a step of {sizes.chunk_tokens} tokens and {sizes.running} requests, about {gb(cost.of(sizes))}, "
        f"does not fit ({_left(memory)}): {advice}",
        "chunked_prefill_size",
    )


def graphs_too_large(
    sizes: StepSizes, cost: StepCost, memory: DeviceMemory, *, rehearsed: bool
) -> PhloemError:
    """What to say when memory ran out while decode steps were captured, as `step_too_large`."""
    rows = fewer_graph_rows(sizes, lambda rows: rows * cost.per_graph_row + WORKSPACE_BYTES <= memory.free)
    fewer = f"--cuda-graph-max-bs {rows}, or " if rows is not None else ""
    return out_of_memory(
        f"CUDA graphs for up to {sizes.graph_rows} requests do not fit ({_left(memory)}): "
        f"{_lower_share(rehearsed)}give {fewer}--disable-cuda-graph, or {stop_others(memory)}",
        "cuda_graph_max_bs",
    )


def _left(memory: DeviceMemory) -> str:
    return f"{gb(memory.free)} of {memory.name}'s {gb(memory.total)} were free"


def _lower_share(rehearsed: bool) -> str:
    """What helps where the pool's size has a say, which it has not in the rehearsal."""
    return "lower --mem-fraction-static, or " if rehearsed else ""


def _advice(
    sizes: StepSizes, found: StepSizes | None, least: int, memory: DeviceMemory, share: str = ""
) -> str:
    """The smaller step that fits; where none does, how much the smallest would need. Beside it `share`,
    another advice."""
    if found is not None:
        return f"{share}lower {lowered(sizes, found)}, or stop what else uses the device"
    need = f"even {as_flags(smallest_step(sizes))} would need {gb(least)}"
    return f"{need}: {share}{stop_others(memory)}"

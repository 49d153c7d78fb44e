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


class Rehearsal(NamedTuple):
    """What a start rehearses, and what comes beside it later: `channels` for KV transfer, `one_channel` with
    `--transfer-peers 1`."""

    sizes: StepSizes
    cost: StepCost
    page_bytes: int
    page_size: int
    context_length: int
    channels: int = 0
    one_channel: int = 0

    def num_pages(self, sizes: StepSizes) -> int:
        """That a step writes."""
        return rehearsal_pages(sizes, self.page_size, self.context_length)

    def pool_bytes(self, sizes: StepSizes) -> int:
        """Of the pages that a step writes, with the scratch page."""
        return (self.num_pages(sizes) + 1) * self.page_bytes

    def need(self, sizes: StepSizes, channels: int) -> int:
        """Of all that must fit beside the weights."""
        graphs = sizes.graph_rows * self.cost.per_graph_row + WORKSPACE_BYTES
        return self.pool_bytes(sizes) + self.cost.of(sizes) + graphs + channels + MARGIN_BYTES

    def smaller(self, free: int, channels: int) -> StepSizes | None:
        """A smaller step that fits, halved where it takes most, its pages counted."""
        cost = self.cost._replace(
            per_token=self.cost.per_token + self.page_bytes // self.page_size,
            per_row=self.cost.per_row + self.page_bytes,
        )
        return smaller_step(self.sizes, cost, lambda sizes: self.need(sizes, channels) <= free)


def pages_of(rehearsal: Rehearsal) -> str:
    """What there was no memory for."""
    pool = gb(rehearsal.pool_bytes(rehearsal.sizes))
    return f"KV pages for {_step(rehearsal.sizes)}, {pool},"


def graphs_of(sizes: StepSizes) -> str:
    return f"CUDA graphs for up to {sizes.graph_rows} requests"


def step_of(sizes: StepSizes, cost: StepCost) -> str:
    return f"{_step(sizes)}, about {gb(cost.of(sizes))},"


def _step(sizes: StepSizes) -> str:
    return f"a step of {sizes.chunk_tokens} tokens and {sizes.running} requests"


def rehearsal_failed(what: str, rehearsal: Rehearsal, memory: DeviceMemory) -> PhloemError:
    """What to say when memory ran out in the rehearsal, which the flags of the step decide, not
    `--mem-fraction-static`. `what` did not fit; `memory` is with the weights loaded, and nothing else. What
    is advised has room for all that comes later, too."""
    sizes, free = rehearsal.sizes, memory.free
    told = f"the weights fit, but {what} did not: beside them {_left(memory)}"
    for channels in (rehearsal.channels, rehearsal.one_channel):
        if (found := rehearsal.smaller(free, channels)) is not None:
            smaller = lowered(sizes, found, to_one_peer=channels < rehearsal.channels)
            advice = f"lower {smaller}, or stop what else uses the device"
            return out_of_memory(f"{told}: {advice}", "chunked_prefill_size")
    least = smallest_step(sizes)
    need = gb(rehearsal.need(least, rehearsal.one_channel))
    advice = f"even {as_flags(least)} would need {need}: {stop_others(memory)}"
    return out_of_memory(f"{told}; {advice}", "device")


def step_too_large(sizes: StepSizes, cost: StepCost, memory: DeviceMemory) -> PhloemError:
    """What to say when memory ran out in the largest step at start, which was rehearsed; `memory` is as it
    was before the step."""
    found = smaller_step(sizes, cost, lambda sizes: cost.of(sizes) <= memory.free)
    smaller = f"lower {lowered(sizes, found)}, or " if found is not None else ""
    return out_of_memory(
        f"{step_of(sizes, cost)} does not fit ({_left(memory)}): lower --mem-fraction-static, or "
        f"{smaller}stop what else uses the device",
        "chunked_prefill_size",
    )


def graphs_too_large(sizes: StepSizes, cost: StepCost, memory: DeviceMemory) -> PhloemError:
    """What to say when memory ran out while decode steps were captured, as `step_too_large`."""
    rows = fewer_graph_rows(sizes, lambda rows: rows * cost.per_graph_row + WORKSPACE_BYTES <= memory.free)
    fewer = f"--cuda-graph-max-bs {rows}, or " if rows is not None else ""
    return out_of_memory(
        f"{graphs_of(sizes)} do not fit ({_left(memory)}): lower --mem-fraction-static, or give "
        f"{fewer}--disable-cuda-graph, or stop what else uses the device",
        "cuda_graph_max_bs",
    )


def _left(memory: DeviceMemory) -> str:
    return f"{gb(memory.free)} of {memory.name}'s {gb(memory.total)} were free"

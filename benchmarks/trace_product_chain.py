"""Where the time of a decode step goes whose products between two attentions are one launch, on a Hopper GPU.

    python benchmarks/trace_product_chain.py --model-path benchmarks/models/llama-3.1-8b [--rows 64]

Random weights; the step out of Triton's kernels beside it. The floor is the bytes of weights and KV over what
a sum reads in the same run. The time line has medians over the middle layers, in us, counted from the end of
the product before (its last block): its span; when x may be read; when half of the blocks, and the last one,
have their first unit, and their last unit; how long after that, in half of the blocks, their parts of sums
are written, those of others known, and all finished. Attention is from the end of a launch until the next one
may read its output; where it is page_attention.cu, when the first, half and the last of its blocks begin,
have asked for their first and last keys, have queries, have their first and last keys, have ended.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.graph_time import graph_ms
from benchmarks.trace_decode_step import World
from phloem.kernels import ops
from phloem.kernels.hopper_ops.chain_plan import ChainPlan, size_of
from phloem.kernels.hopper_ops.chain_step import ChainStep
from phloem.kernels.triton_ops.decode_kernels import DecodeKernels
from phloem.kernels.triton_ops.key_shares import MANY
from phloem.kernels.types import DecodeRows
from phloem.shared.engine.models.decode_pass import DecodePass, decode_shape, step_weights
from phloem.shared.engine.offline.ceilings import measure_ceilings
from phloem.shared.engine.offline.floors import decode_floor_s, model_cost

CUDA = torch.device("cuda")
PRODUCTS = ("o", "gate_up", "down", "qkv")
MAX_LAUNCHES, MAX_PRODUCTS, STAMPS, MAX_BLOCKS = 96, 4, 6, 160  # as in chain.cuh
MAY_READ, FIRST_UNIT, LAST_UNIT, WRITTEN, KNOWN, FINISHED = range(STAMPS)
# Stamps, as in page_attention.cu.
ATTENTION = ("begins", "asked", "asked all", "queries", "keys", "all keys", "ended")
Float64Array = npt.NDArray[np.float64]


class Times(NamedTuple):
    """Stamps of a step, us: products `[launches, products, STAMPS, blocks]`, attention `[layers, stamps,
    blocks]`, None where it is Triton's."""

    products: Float64Array
    attention: Float64Array | None


def traced(world: World, plan: ChainPlan, kernels: DecodeKernels, rows: DecodeRows) -> Times:
    """Of the last of some steps."""
    shape, weights = decode_shape(world.decoder.config), step_weights(world.decoder)
    step = ChainStep(shape, weights, world.kv, {plan.size: plan}, kernels, trace=True)
    graph_ms(lambda: step(rows), repeats=4)
    stamps = np.frombuffer(step.chain.kernels[plan.size].read_global("trace"), np.int64)
    stamps = stamps.reshape(MAX_LAUNCHES, MAX_PRODUCTS, STAMPS, MAX_BLOCKS)
    products = stamps[: len(weights.layers) + 1, ..., : plan.blocks] / 1e3
    if step.pages is None:
        return Times(products, None)
    stamps = np.frombuffer(step.pages.kernel.read_global("trace"), np.int64)
    stamps = stamps.reshape(MAX_LAUNCHES, len(ATTENTION), MAX_BLOCKS)
    return Times(products, stamps[: len(weights.layers), :, : step.pages.plan.blocks] / 1e3)


def show_time_line(all_times: Times) -> None:
    times = all_times.products
    layers = range(len(times) // 4, len(times) - len(times) // 4)
    names = ("span", "x may", "unit 1", "all 1", "unit n", "all n", "written", "known", "finished")
    print(f"{'us':10} " + " ".join(f"{name:>8}" for name in names))
    begins = {layer: times[layer, 0, MAY_READ].max() for layer in layers}
    for place, name in enumerate(PRODUCTS):
        lines = []
        for layer in layers:
            before = begins[layer] if place == 0 else times[layer, place - 1, FINISHED].max()
            lines.append(_line(times[layer, place] - before))
        print(f"{name:10} " + " ".join(f"{value:8.2f}" for value in np.median(np.array(lines), axis=0)))
    ends = {layer: times[layer, -1, FINISHED].max() for layer in layers}
    attention = [begins[layer] - ends[layer - 1] for layer in layers if layer - 1 in ends]
    print(f"{'attention':10} {np.median(attention):8.2f}")
    if all_times.attention is not None:
        show_attention([_since(all_times.attention[layer], ends[layer]) for layer in layers])


def show_attention(layers: list[Float64Array]) -> None:
    for what, name in enumerate(ATTENTION):
        lines = [np.percentile(since[what], (0, 50, 100)) for since in layers]
        print(f"  {name:10} " + " ".join(f"{value:8.2f}" for value in np.median(np.array(lines), axis=0)))


def _since(stamps: Float64Array, end: float) -> Float64Array:
    """Counted from the end of the launch before, of blocks that have keys: others leave stamps of none."""
    return stamps[:, stamps[ATTENTION.index("all keys")] > end] - end


def _line(product: Float64Array) -> list[float]:
    works = product[LAST_UNIT] > product[MAY_READ].min()  # blocks without work leave none
    last, finished = product[LAST_UNIT][works], product[FINISHED][works]
    joins = bool((product[WRITTEN][works] > last).all())
    written = product[WRITTEN][works] - last if joins else np.zeros(1)
    known = product[KNOWN][works] - last if joins else np.zeros(1)
    return [
        product[FINISHED].max(),
        product[MAY_READ].max(),
        np.median(product[FIRST_UNIT][works]),
        product[FIRST_UNIT][works].max(),
        np.median(last),
        last.max(),
        np.median(written),
        np.median(known),
        np.median(finished - last),
    ]


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    world = World(options.model_path, options.rows, options.context)
    shape = decode_shape(world.decoder.config)
    kernels = ops.decode_kernels(shape, torch.bfloat16, CUDA, options.rows)
    plans = ops.plan_chain_step(shape, torch.bfloat16, CUDA)
    if plans is None or kernels is None:
        print("the kernels are for Hopper GPUs, and not for every model")
        return 1
    ceilings, cost = measure_ceilings(CUDA, torch.bfloat16), model_cost(world.decoder.config, 2)
    floor = decode_floor_s(cost, ceilings, options.rows, options.context) * 1e3
    rows, plan = world.rows(MANY), plans[size_of(options.rows)]
    chain = ops.chain_step(shape, step_weights(world.decoder), world.kv, {plan.size: plan}, kernels)
    others = DecodePass(world.decoder, kernels)
    ms = graph_ms(lambda: chain(rows), repeats=20)
    other_ms = graph_ms(lambda: others.forward(rows, world.kv), repeats=20)
    print(f"{torch.cuda.get_device_name()}, {options.rows} x {options.context}; floor {floor:.3f} ms")
    print(
        f"chain {ms:.3f} ms = {ms / floor:.3f} x; Triton's kernels {other_ms:.3f} = {other_ms / floor:.3f} x"
    )
    print(f"{plan.blocks} blocks in clusters of {plan.cluster}")
    print(f"rings of {plan.weight_bytes} and {plan.x_bytes} bytes; {dict(plan.tiles)}")
    show_time_line(traced(world, plan, kernels, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

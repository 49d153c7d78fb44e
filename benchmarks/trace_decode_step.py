"""Where the time of a decode step in one launch goes, on a Hopper GPU.

    python benchmarks/trace_decode_step.py --model-path benchmarks/models/llama-3.1-8b [--rows 1]

Random weights; the step in several launches beside it. The floor is the bytes of weights and KV over what a
sum reads in the same run. The time line has medians over the middle layers, in us, counted from the end of
the phase before (its last block): its span; when the first and the last block begin; when half of the blocks
have their first unit, their last unit, have written, have told it; when the last block has its last unit, has
written. Attention begins, in each block, when its queries are there: no block waits for all of qkv. It has no
units: there it is scores, and parts written; half of the blocks have written when their parts are joined.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.graph_time import graph_ms
from phloem.kernels import ops
from phloem.kernels.hopper_ops.decode_step import LaunchPlan, OneLaunchStep
from phloem.kernels.triton_ops.key_shares import (
    FIELDS,
    MANY,
    ONE_EACH,
    Sharing,
    make_items,
    num_items,
    share_size,
)
from phloem.kernels.types import DecodeRows
from phloem.shared.engine.models.decode_pass import DecodePass, decode_shape, step_weights
from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.offline.ceilings import measure_ceilings
from phloem.shared.engine.offline.floors import decode_floor_s, model_cost
from phloem.shared.engine.weights.loader import load_decoder

CUDA = torch.device("cuda")
PAGE_SIZE = 16
PHASES = ("qkv", "attention", "o", "gate, up", "down")
MAX_PHASES, STAMPS, MAX_BLOCKS = 512, 6, 160  # as in decode_step.cu
Float64Array = npt.NDArray[np.float64]


class World:
    """A decoder, its cache, and a step of rows that are all equally long."""

    def __init__(self, model_dir: Path, num_rows: int, context: int) -> None:
        self.decoder = load_decoder(
            model_dir,
            load_format="dummy",
            dtype=torch.bfloat16,
            device=CUDA,
            progress=lambda done, total: None,
        )
        config = self.decoder.config
        pages = -(-context // PAGE_SIZE)
        self.kv = KVCache.allocate(config, num_rows * pages, PAGE_SIZE, torch.bfloat16, CUDA)
        for plane in self.kv.k + self.kv.v:
            plane.normal_()
        table = torch.randperm(num_rows * pages).view(num_rows, pages)
        slots, last = torch.arange(num_rows), context - 1
        cos, sin = self.decoder.rope.halves(context, torch.bfloat16)
        self._lens = np.full(num_rows, context)
        self._rows = DecodeRows(
            token=torch.randint(0, config.vocab_size, (num_rows,)).to(CUDA),
            slot=slots.to(CUDA),
            position=torch.full((num_rows,), last).to(CUDA),
            write_index=(table[:, last // PAGE_SIZE] * PAGE_SIZE + last % PAGE_SIZE).to(CUDA),
            last_token=torch.zeros(num_rows, dtype=torch.int64, device=CUDA),
            page_table=table.to(torch.int32).to(CUDA),
            work=torch.zeros(0, device=CUDA),
            cos=cos,
            sin=sin,
        )

    def rows(self, sharing: Sharing) -> DecodeRows:
        heads, count = self.decoder.config.num_kv_heads, len(self._lens)
        work = np.zeros((num_items(count, heads), FIELDS), np.int32)
        make_items(np.arange(count), self._lens, share_size(self._lens, heads, sharing), work)
        return self._rows._replace(work=torch.from_numpy(work).to(CUDA))


def traced(decoder: Decoder, kv: KVCache, plan: LaunchPlan, rows: DecodeRows) -> Float64Array:
    """Stamps of the last of some steps, us: `[phases, STAMPS, blocks]`."""
    step = OneLaunchStep(decode_shape(decoder.config), step_weights(decoder), kv, plan, trace=True)
    for _ in range(4):
        step(rows)
    kernel = next(kernel for size, kernel in step.kernels.items() if len(rows.token) <= size)
    stamps = np.frombuffer(kernel.read_global("trace"), np.int64)
    num_phases = len(PHASES) * decoder.config.num_layers + 1
    return stamps.reshape(MAX_PHASES, STAMPS, MAX_BLOCKS)[:num_phases, :, : plan.blocks] / 1e3


def show_time_line(times: Float64Array) -> None:
    layers = len(times) // len(PHASES)
    names = ("span", "first", "last", "unit 1", "unit n", "written", "told", "all n", "all w")
    print(f"{'us':10} " + " ".join(f"{name:>7}" for name in names))
    for place, name in enumerate(PHASES):
        phases = range((layers // 4) * len(PHASES) + place, (layers - layers // 4) * len(PHASES), len(PHASES))
        rows = [_line(times[phase] - times[phase - 1][5].max(), name) for phase in phases if phase > 0]
        print(f"{name:10} " + " ".join(f"{value:7.2f}" for value in np.median(np.array(rows), axis=0)))
    whole, vocabulary = times[-1][5].max() - times[0][0].min(), times[-1][5].max() - times[-2][5].max()
    print(f"vocabulary {vocabulary:7.2f}; whole {whole:.2f}")


def _line(phase: Float64Array, name: str) -> list[float]:
    begun = phase[0].min()
    first, last = (1, 2) if name == "attention" else (2, 3)

    def median(stamp: int) -> float:
        return float(np.median(phase[stamp][phase[stamp] >= begun]))  # blocks without work leave none

    return [
        phase[5].max(),
        begun,
        phase[0].max(),
        median(first),
        median(last),
        median(4),
        median(5),
        phase[last].max(),
        phase[4].max(),
    ]


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    world = World(options.model_path, options.rows, options.context)
    shape = decode_shape(world.decoder.config)
    plan = ops.plan_decode_step(shape, torch.bfloat16, CUDA)
    kernels = ops.decode_kernels(shape, torch.bfloat16, CUDA, options.rows)
    if plan is None or kernels is None:
        print("the kernel of whole steps is for Hopper GPUs, and not for every model")
        return 1
    ceilings = measure_ceilings(CUDA, torch.bfloat16)
    cost = model_cost(world.decoder.config, 2)
    floor = decode_floor_s(cost, ceilings, options.rows, options.context) * 1e3
    one, several = world.rows(ONE_EACH), world.rows(MANY)
    launch = ops.decode_step(shape, step_weights(world.decoder), world.kv, plan)
    launches = DecodePass(world.decoder, kernels)
    ms = graph_ms(lambda: launch(one), repeats=20)
    others = graph_ms(lambda: launches.forward(several, world.kv), repeats=20)
    print(f"{torch.cuda.get_device_name()}, {options.rows} x {options.context}: {plan}")
    print(f"floor {floor:.3f} ms; one launch {ms:.3f} = {ms / floor:.3f} x")
    print(f"several launches {others:.3f} = {others / floor:.3f} x")
    show_time_line(traced(world.decoder, world.kv, plan, one))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

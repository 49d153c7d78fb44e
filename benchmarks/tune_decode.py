"""Finds the tiles of `kernels/triton_ops/tilings.py` for one model's products and attention, on a GPU.

    python benchmarks/tune_decode.py --model-path benchmarks/models/llama-3.1-8b [--rows 1,16,64] [--tries 40]

For each product and batch size it times random tilings over weights that don't fit the cache, in graphs, and
prints the fastest beside the library's product: what `tilings.py` holds was found so. Kernels are compiled
by a pool of processes first. Takes one to two minutes on a 16-core host.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.graph_time import graph_ms
from phloem.kernels.triton_ops.skinny import Squares, Workspace, block_of_rows, skinny_linear
from phloem.kernels.triton_ops.tilings import Product, Tiling
from phloem.shared.engine.models.decode_pass import decode_shape
from phloem.shared.model_store.model_config import load_model_config

CUDA = torch.device("cuda")
COLD_BYTES = 600_000_000  # of weights, several times a Hopper's L2 cache
SHARED_BYTES = 200 << 10
SHOWN = 4


class Shape(NamedTuple):
    product: Product
    n: int
    k: int
    num_rows: int

    @property
    def weight_rows(self) -> int:
        return 2 * self.n if self.product == "gated" else self.n


class Bench:
    """One product's tensors: as many weights as make the cache useless."""

    def __init__(self, shape: Shape, *, copies: int | None = None) -> None:
        self.shape = shape
        num_bytes = 2 * shape.weight_rows * shape.k
        count = copies or -(-COLD_BYTES // num_bytes)
        self.weights = [
            torch.randn(shape.weight_rows, shape.k, dtype=torch.bfloat16, device=CUDA) / shape.k**0.5
            for _ in range(count)
        ]
        rows = block_of_rows(shape.num_rows)
        self._x = torch.randn(shape.num_rows, shape.k, dtype=torch.bfloat16, device=CUDA)
        self._out = torch.empty(shape.num_rows, shape.n, dtype=torch.bfloat16, device=CUDA)
        self._residual = torch.randn_like(self._out)
        self._gain = torch.ones(shape.n, dtype=torch.bfloat16, device=CUDA)
        self._squares = torch.ones(shape.n // 16, rows, device=CUDA)
        self._workspace = Workspace(CUDA, max_cells=16 * shape.weight_rows * rows, max_tiles=shape.n)

    def run(self, tiling: Tiling) -> None:
        for weight in self.weights:
            if self.shape.product == "adds":
                skinny_linear(
                    self._x,
                    weight,
                    self._out,
                    tiling,
                    self._workspace,
                    residual=self._residual,
                    gain=self._gain,
                    squares_out=self._squares,
                    pdl=True,
                )
            else:
                skinny_linear(
                    self._x,
                    weight,
                    self._out,
                    tiling,
                    self._workspace,
                    norm=Squares(self._squares, 64),
                    eps=1e-5,
                    activation="silu" if self.shape.product == "gated" else None,
                    pdl=True,
                )

    def library(self) -> None:
        for weight in self.weights:
            torch.nn.functional.linear(self._x, weight)

    def gigabytes_per_s(self, work: Callable[[], None]) -> float:
        num_bytes = sum(weight.numel() * weight.element_size() for weight in self.weights)
        return float(num_bytes / graph_ms(work) / 1e6)


def tilings(shape: Shape) -> Iterator[Tiling]:
    """All that divide the weight, fit into shared memory and give the device enough blocks."""
    for block_n, block_k, split, stages, warps, tma in itertools.product(
        (32, 64, 128), (64, 128, 256), (1, 2, 3, 4, 7, 8), (3, 4, 5, 6, 8), (4, 8), (False, True)
    ):
        both = 2 if shape.product == "gated" else 1
        shared = stages * (block_n * both + block_of_rows(shape.num_rows)) * block_k * 2
        blocks = shape.n // block_n * split
        divides = shape.n % block_n == 0 and shape.k % (block_k * split) == 0
        if divides and 24 << 10 <= shared <= SHARED_BYTES and blocks >= 90 and (split == 1 or blocks < 1024):
            yield Tiling(block_n, block_k, split, stages, warps, tma)


def compiled(task: tuple[Shape, Tiling]) -> bool:
    """Runs in a process of the pool: whether the kernel compiles and runs."""
    shape, tiling = task
    try:
        Bench(shape, copies=1).run(tiling)
        torch.cuda.synchronize()
    except Exception as error:  # a tiling that Triton refuses is no result, whatever its reason
        print(f"{shape} {tiling}: {type(error).__name__}", file=sys.stderr)
        return False
    return True


def _read_gigabytes_per_s() -> float:
    data: Tensor = torch.ones(1 << 30, dtype=torch.float32, device=CUDA)
    return 4 * data.numel() / graph_ms(data.sum, 8) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--rows", default="1,16,64")
    parser.add_argument("--tries", type=int, default=40, help="tilings per product and batch size")
    options = parser.parse_args()
    products = dict.fromkeys(decode_shape(load_model_config(options.model_path)).products())
    shapes = [Shape(*product, int(rows)) for product in products for rows in options.rows.split(",")]
    generator = random.Random(0)
    tasks = []
    for shape in shapes:
        found = list(tilings(shape))
        tasks += [(shape, tiling) for tiling in generator.sample(found, min(options.tries, len(found)))]
    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as pool:
        usable = [
            task for task, fine in zip(tasks, pool.map(compiled, tasks, chunksize=4), strict=True) if fine
        ]
    print(f"{torch.cuda.get_device_name()}: a sum reads {_read_gigabytes_per_s():.0f} GB/s; GB/s of weights:")
    for shape in shapes:
        bench = Bench(shape)
        rates = [
            (bench.gigabytes_per_s(partial(bench.run, tiling)), tiling)
            for of, tiling in usable
            if of == shape
        ]
        rates.sort(key=lambda rate: -rate[0])
        best = "  ".join(f"{rate:.0f} {tuple(tiling)}" for rate, tiling in rates[:SHOWN])
        print(f"{shape.product} {shape.n} x {shape.k}, {shape.num_rows} rows: library "
              f"{bench.gigabytes_per_s(bench.library):.0f} | {best}")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

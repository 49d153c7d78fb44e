"""The matrix products between two attentions in one launch on Hopper (`product_chain.cu`)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from phloem.kernels.hopper_ops.chain_plan import (
    MAX_JOINS,
    NAMES,
    SIZES,
    TEAMS,
    ChainPlan,
    size_of,
)
from phloem.kernels.hopper_ops.program import Kernel, Launch, address, compile_file
from phloem.kernels.hopper_ops.tensor_map import INNER, MAP_BYTES, halves_map, map_bytes, map_field, rows_map
from phloem.kernels.types import LinearWeight

MAX_ROWS = SIZES[-1]
MAX_PRODUCTS = 4
_WARPS = 4 * TEAMS  # that multiply
_THREADS = 32 * (_WARPS + 3)
_COUNTERS = MAX_PRODUCTS * (1 + MAX_JOINS * _WARPS)
_HEADERS = ("ptx.cuh", "wgmma.cuh", "chain.cuh", "rings.cuh", "finish.cuh", "joins.cuh")


class ChainLink(NamedTuple):
    """One product of a launch. x `[M, K]`, out `[M, N]`; name: of `chain_plan.NAMES`.

    With squares, x is the residual stream times the norm's gain, not divided yet, and squares float32
    `[num_squares, size]` are sums of the stream's squares. With residual `[M, N]` (in place) and the next
    norm's gain `[N]`, squares_out is float32 `[ProductChain.num_squares, size]`.
    """

    name: str
    x: Tensor
    w: LinearWeight
    out: Tensor
    squares: Tensor | None = None
    num_squares: int = 0
    residual: Tensor | None = None
    gain: Tensor | None = None
    squares_out: Tensor | None = None


class ProductChain:
    """The kernels of one model on one device, with what a step's launches share. It must outlive every graph
    that holds one of them."""

    def __init__(
        self,
        plans: Mapping[int, ChainPlan],
        num_launches: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        trace: bool = False,
    ) -> None:
        """plans by size. Raises CudaError where the kernels can't be made or run."""
        self._plans, self._num_launches = plans, num_launches
        for plan in plans.values():
            assert plan.blocks % plan.cluster == 0, "clusters are whole"
            joined = [tiles for tiles in plan.tiles.values() if tiles.splits > 1]
            assert all(tiles.items <= plan.blocks for tiles in joined), "parts meet once in a launch"
        with ThreadPoolExecutor() as pool:  # the compiler leaves the interpreter to others
            images = list(pool.map(lambda plan: _image(plan, dtype, trace), plans.values()))
        self.kernels = {
            size: Kernel(image, "product_chain", device, _launch(plan))
            for (size, plan), image in zip(plans.items(), images, strict=True)
        }
        self._counters = torch.zeros((num_launches, _COUNTERS), dtype=torch.int32, device=device)
        floats = max(plan.part_floats for plan in plans.values())
        self._parts = torch.empty(floats, dtype=torch.float32, device=device)
        self._maps: dict[tuple[int, str, int], bytes] = {}

    def num_squares(self, name: str, num_rows: int) -> int:
        """How many sums of each row's squares a product leaves."""
        return self._plans[size_of(num_rows)].tiles[name].items * TEAMS

    def __call__(self, launch: int, links: list[ChainLink], eps: float) -> None:
        """`launch`: its number in the step, from 0 on; all of a step's are launched, in order."""
        num_rows = len(links[0].x)
        plan = self._plans[size_of(num_rows)]
        chain = _Chain(
            (_Product * MAX_PRODUCTS)(*(self._product(plan, link) for link in links)),
            self._parts.data_ptr(),
            self._counters[launch].data_ptr(),
            self._counters[launch - 1].data_ptr(),
            len(links),
            num_rows,
            eps,
            launch,
        )
        self.kernels[plan.size](_launch(plan), ((chain,), (None,)))

    def _product(self, plan: ChainPlan, link: ChainLink) -> _Product:
        tiles, (n, k) = plan.tiles[link.name], (link.out.shape[1], link.x.shape[1])
        return _Product(
            map_field(self._weight_map(plan, link)),
            map_field(map_bytes(rows_map(link.x, plan.size, tiles.depth * INNER))),
            address(link.w.bias),
            address(link.squares),
            address(link.residual),
            address(link.gain),
            address(link.out),
            address(link.squares_out),
            NAMES.index(link.name),
            n,
            k,
            tiles.num,
            link.num_squares,
        )

    def _weight_map(self, plan: ChainPlan, link: ChainLink) -> bytes:
        weight, key = link.w.weight, (link.w.weight.data_ptr(), link.name, plan.size)
        if key not in self._maps:
            encode = halves_map if link.name == "gate_up" else rows_map
            tiles = plan.tiles[link.name]
            self._maps[key] = map_bytes(
                encode(weight, tiles.rows // plan.boxes(link.name), tiles.depth * INNER)
            )
        return self._maps[key]


def multiply_source(tiles: frozenset[int], half: bool) -> str:
    """`multiply<N>` of wgmma.cuh for these tiles: PTX has one instruction for each, which names all its
    registers."""
    return "#pragma once\n" + "".join(_multiply(rows, "f16" if half else "bf16") for rows in sorted(tiles))


def _multiply(rows: int, kind: str) -> str:
    count = rows // 2
    places = ",".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    instruction = f"wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.{kind}.{kind}"
    return (
        f"template <> __device__ __forceinline__\n"
        f"void multiply<{rows}>(float (&d)[{count}], u64 x, u64 w) {{\n"
        f'  asm volatile("{instruction} {{{places}}}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;"\n'
        f'    : {sums} : "l"(x), "l"(w));\n}}\n'
    )


def chain_defines(plan: ChainPlan, dtype: torch.dtype) -> dict[str, object]:
    """What the kernel is compiled with."""
    tiles = [plan.tiles[name] for name in NAMES]
    return {
        "HALF": int(dtype == torch.float16),
        "ROWS": plan.size,
        "W_BYTES": plan.weight_bytes,
        "X_BYTES": plan.x_bytes,
        "EXCHANGED": plan.exchanged,
        "CLUSTER": plan.cluster,
        "TILES": ",".join(str(each.rows) for each in tiles),
        "DEPTHS": ",".join(str(each.depth) for each in tiles),
        "SPLITS": ",".join(str(each.splits) for each in tiles),
    }


def _image(plan: ChainPlan, dtype: torch.dtype, trace: bool) -> bytes:
    rows = frozenset(tiles.rows // plan.boxes(name) for name, tiles in plan.tiles.items())
    made = {"multiply.cuh": multiply_source(rows, dtype == torch.float16)}
    defines = chain_defines(plan, dtype) | ({"TRACE": 1} if trace else {})
    return compile_file("product_chain.cu", _HEADERS, defines, made)


def _launch(plan: ChainPlan) -> Launch:
    return Launch(plan.blocks, _THREADS, plan.shared_bytes, dependent=True, cluster=plan.cluster)


class _Product(ctypes.Structure):
    """`Product` of product_chain.cu."""

    _fields_ = [
        ("w", ctypes.c_ubyte * MAP_BYTES),
        ("x", ctypes.c_ubyte * MAP_BYTES),
        *((f"pointer_{index}", ctypes.c_void_p) for index in range(6)),
        *((f"int_{index}", ctypes.c_int) for index in range(5)),
        ("unused", ctypes.c_ubyte * 60),
    ]


class _Chain(ctypes.Structure):
    """`Chain` of product_chain.cu."""

    _fields_ = [
        ("products", _Product * MAX_PRODUCTS),
        *((f"pointer_{index}", ctypes.c_void_p) for index in range(3)),
        *((f"int_{index}", ctypes.c_int) for index in range(2)),
        ("eps", ctypes.c_float),
        ("launch", ctypes.c_int),
        ("unused", ctypes.c_ubyte * 24),
    ]


assert (ctypes.sizeof(_Product), ctypes.sizeof(_Chain)) == (384, 4 * 384 + 64), "as in product_chain.cu"

"""Matrix products of few rows, at the speed of memory: `y[m, n] = sum_k x[m, k] * w[n, k]` for decode.

A tile of the weight is the left operand, so that a handful of rows fills the matrix units' narrow side.
What stands between two products of a layer is done in their epilogues, and nothing else is launched:

    squares of a row (from the kernel before)  ->  the row's RMS norm, as a factor of the sums
    bias; activation(gate) * up; or residual +=, times the next norm's gain, and squares of the new residual

With programmatic dependent launch a kernel is resident before the one before it has ended, and waits there
for its results (CUDA programming guide, "Programmatic Dependent Launch"). Where one tile per column block
would not fill the device, the sum over k is split; the last block to arrive adds the parts, always in the
same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from phloem.kernels.triton_ops.activation import activate
from phloem.kernels.triton_ops.tilings import Tiling
from phloem.kernels.types import Activation


@triton.jit
def _finish(
    sums,
    up_sums,
    factor,
    bias,
    residual,
    gain,
    out,
    squares_out,
    tile,
    column,
    m,
    in_m,
    row_stride: tl.constexpr,
    n: tl.constexpr,
    activation: tl.constexpr,
    normed: tl.constexpr,
    adds: tl.constexpr,
    has_bias: tl.constexpr,
):
    """What follows the sums: `[block_n, block_m]`, float32."""
    if normed:
        sums = sums * factor[None, :]
    if has_bias:
        sums += tl.load(bias + column).to(tl.float32)[:, None]
    if activation is not None:
        if normed:
            up_sums = up_sums * factor[None, :]
        if has_bias:
            up_sums += tl.load(bias + n + column).to(tl.float32)[:, None]
        sums = activate(sums, activation) * up_sums
    place = m[None, :].to(tl.int64) * n + column[:, None]
    if adds:
        sums += tl.load(residual + place, mask=in_m[None, :], other=0.0).to(tl.float32)
        stored = sums.to(residual.dtype.element_ty)
        tl.store(residual + place, stored, mask=in_m[None, :])
        sums = stored.to(tl.float32)
        tl.store(squares_out + tile * row_stride + m, tl.sum(sums * sums, axis=0), mask=in_m)
        sums = sums * tl.load(gain + column).to(tl.float32)[:, None]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=in_m[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _skinny_kernel(
    x,
    w,
    w_tiles,
    bias,
    squares,
    residual,
    gain,
    out,
    squares_out,
    parts,
    arrivals,
    num_rows,
    eps,
    n: tl.constexpr,
    k: tl.constexpr,
    num_squares: tl.constexpr,
    squares_block: tl.constexpr,
    row_stride: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    split_k: tl.constexpr,
    stages: tl.constexpr,
    activation: tl.constexpr,
    normed: tl.constexpr,
    adds: tl.constexpr,
    has_bias: tl.constexpr,
    tma: tl.constexpr,
    pdl: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    span: tl.constexpr = k // split_k
    gated: tl.constexpr = activation is not None
    begin = split * span
    column = tile * block_n + tl.arange(0, block_n)
    if pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.arange(0, block_m)
    in_m = m < num_rows
    factor = tl.full((block_m,), 1.0, tl.float32)
    if normed:
        part = tl.arange(0, squares_block)
        known = (part[:, None] < num_squares) & in_m[None, :]
        total = tl.load(squares + part[:, None] * row_stride + m[None, :], mask=known, other=0.0)
        factor = tl.rsqrt(tl.sum(total, axis=0) / k + eps)

    sums = tl.zeros((block_n, block_m), tl.float32)
    up_sums = tl.zeros((block_n, block_m), tl.float32)
    for start in tl.range(begin, begin + span, block_k, num_stages=stages):
        inner = start + tl.arange(0, block_k)
        rows = tl.load(x + m[None, :] * k + inner[:, None], mask=in_m[None, :], other=0.0)
        if tma:
            weight = w_tiles.load([tile * block_n, start])
        else:
            place = w + column[:, None].to(tl.int64) * k + inner[None, :]
            weight = tl.load(place, eviction_policy="evict_first")
        sums = tl.dot(weight, rows, sums)
        if gated:
            if tma:
                up = w_tiles.load([n + tile * block_n, start])
            else:
                place = w + (column[:, None] + n).to(tl.int64) * k + inner[None, :]
                up = tl.load(place, eviction_policy="evict_first")
            up_sums = tl.dot(up, rows, up_sums)

    if split_k == 1:
        _finish(
            sums, up_sums, factor, bias, residual, gain, out, squares_out, tile, column, m, in_m,
            row_stride, n, activation, normed, adds, has_bias,
        )  # fmt: skip
    else:
        area: tl.constexpr = block_n * block_m
        cell = tl.arange(0, block_n)[:, None] * block_m + m[None, :]
        kinds: tl.constexpr = 2 if gated else 1
        mine = parts + (tile * split_k + split).to(tl.int64) * (area * kinds)
        tl.store(mine + cell, sums)
        if gated:
            tl.store(mine + area + cell, up_sums)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == split_k - 1:
            tl.store(arrivals + tile, 0)
            sums = tl.zeros((block_n, block_m), tl.float32)
            up_sums = tl.zeros((block_n, block_m), tl.float32)
            for other in tl.static_range(split_k):
                theirs = parts + (tile * split_k + other).to(tl.int64) * (area * kinds)
                sums += tl.load(theirs + cell, cache_modifier=".cg")
                if gated:
                    up_sums += tl.load(theirs + area + cell, cache_modifier=".cg")
            _finish(
                sums, up_sums, factor, bias, residual, gain, out, squares_out, tile, column, m, in_m,
                row_stride, n, activation, normed, adds, has_bias,
            )  # fmt: skip


class Workspace:
    """Where split sums meet. One for a stream of launches; a captured graph keeps its addresses."""

    def __init__(self, device: torch.device, *, max_cells: int, max_tiles: int) -> None:
        self.parts = torch.empty(max_cells, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(max_tiles, dtype=torch.int32, device=device)


class Squares(NamedTuple):
    """Sums of squares of each row of the residual stream, by column block: float32 `[num_parts, stride]`."""

    values: Tensor
    num_parts: int


def block_of_rows(num_rows: int) -> int:
    """The tile's rows: the matrix units' narrow side takes 16, 32, 64 or 128."""
    return max(16, int(triton.next_power_of_2(num_rows)))


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    tiling: Tiling,
    workspace: Workspace,
    *,
    bias: Tensor | None = None,
    norm: Squares | None = None,
    eps: float = 0.0,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    gain: Tensor | None = None,
    squares_out: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """`out = f(x @ weight.T)`, see the module. x `[M, K]`, M at most 128, out `[M, N]`; weight `[N, K]`, with
    an activation `[2 * N, K]` (gate first). N is a multiple of the tiling's block_n, K of its
    `block_k * split_k`.

    With `norm`, x is the residual stream times the norm's gain, not divided yet. With `residual` `[M, N]`
    (in place), `gain` `[N]` is the next norm's, and `squares_out` float32 `[N / block_n, stride]` is written.
    """
    num_rows, k = x.shape
    n = out.shape[1]
    tiles = n // tiling.block_n
    stride = squares_out.shape[1] if squares_out is not None else norm.values.shape[1] if norm else 0
    count = norm.num_parts if norm is not None else 1
    options = {"launch_pdl": True} if pdl else {}
    _skinny_kernel[(tiles, tiling.split_k)](
        x,
        weight,
        TensorDescriptor.from_tensor(weight, [tiling.block_n, tiling.block_k]) if tiling.tma else weight,
        weight if bias is None else bias,
        workspace.parts if norm is None else norm.values,
        out if residual is None else residual,
        out if gain is None else gain,
        out,
        workspace.parts if squares_out is None else squares_out,
        workspace.parts,
        workspace.arrivals,
        num_rows,
        eps,
        n=n,
        k=k,
        num_squares=count,
        squares_block=triton.next_power_of_2(count),
        row_stride=stride,
        block_m=block_of_rows(num_rows),
        block_n=tiling.block_n,
        block_k=tiling.block_k,
        split_k=tiling.split_k,
        stages=tiling.stages,
        activation=activation,
        normed=norm is not None,
        adds=residual is not None,
        has_bias=bias is not None,
        tma=tiling.tma,
        pdl=pdl,
        num_warps=tiling.warps,
        **options,
    )

"""The kernels of a decode step, with what they need between launches: one object for one stream of steps.

    begin -> [ normed_linear (qkv) -> attend -> add_linear (o) -> gated_linear -> add_linear (down) ] x layers
          -> normed_linear (vocabulary)

A `Stream` carries the residual stream between them in the form that the next product wants.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phloem.kernels.triton_ops.decode_attention import Joints, decode_attention
from phloem.kernels.triton_ops.decode_begin import begin_rows
from phloem.kernels.triton_ops.skinny import Squares, Workspace, block_of_rows, skinny_linear
from phloem.kernels.triton_ops.tilings import (
    FEW_ROWS,
    MAX_ROWS,
    Product,
    Tiling,
    choose_attention_tiling,
    choose_tiling,
)
from phloem.kernels.types import DecodeRows, DecodeShape, LinearWeight


class Stream(NamedTuple):
    """residual `[B, N]`; scaled: the same times the next norm's gain; squares: sums of residual ** 2."""

    residual: Tensor
    scaled: Tensor
    squares: Squares


class DecodeKernels:
    """Built by `ops.decode_kernels`."""

    def __init__(self, shape: DecodeShape, device: torch.device, max_rows: int) -> None:
        self._shape = shape
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        self._hopper = capability[0] >= 9
        self._workspace = _workspace(shape, device, self._hopper)
        self._joints = Joints(
            device,
            max_rows=max_rows,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
        )

    def takes(self, num_rows: int) -> bool:
        """Whether a step of so many rows can be made of `begin` and the products; `attend` takes any."""
        return all(
            self._tiling(product, n, k, num_rows) is not None for product, n, k in self._shape.products()
        )

    def begin(self, rows: DecodeRows, embedding: Tensor, gain: Tensor) -> Stream:
        """The embeddings `[V, N]` of the rows' tokens; gain `[N]` is the first norm's."""
        shape = (len(rows.token), embedding.shape[1])
        residual, scaled = (
            torch.empty(shape, dtype=embedding.dtype, device=embedding.device) for _ in range(2)
        )
        squares = _squares(1, len(rows.token), embedding.device)
        begin_rows(rows.token, rows.slot, rows.last_token, embedding, gain, residual, scaled, squares)
        return Stream(residual, scaled, Squares(squares, 1))

    def normed_linear(
        self, stream: Stream, w: LinearWeight, eps: float, dtype: torch.dtype | None = None
    ) -> Tensor:
        """`linear(rms_norm(residual), w)`: `[B, out]`, of `dtype` or the stream's."""
        n = w.weight.shape[0]
        out = torch.empty(
            (len(stream.scaled), n), dtype=dtype or stream.scaled.dtype, device=stream.scaled.device
        )
        self._product("normed", stream.scaled, w, out, norm=stream.squares, eps=eps)
        return out

    def gated_linear(self, stream: Stream, w: LinearWeight, eps: float) -> Tensor:
        """`act_mul(linear(rms_norm(residual), w))`: `[B, out / 2]`."""
        out = torch.empty(
            (len(stream.scaled), w.weight.shape[0] // 2),
            dtype=stream.scaled.dtype,
            device=stream.scaled.device,
        )
        self._product("gated", stream.scaled, w, out, norm=stream.squares, eps=eps)
        return out

    def add_linear(self, x: Tensor, w: LinearWeight, stream: Stream, gain: Tensor) -> Stream:
        """Adds `linear(x, w)` to the residual stream, in place; gain `[N]` is the next norm's."""
        n, k = w.weight.shape
        tiling = self._need("adds", n, k, len(x))
        squares = _squares(n // tiling.block_n, len(x), x.device)
        scaled = torch.empty_like(stream.residual)
        self._product("adds", x, w, scaled, residual=stream.residual, gain=gain, squares_out=squares)
        return Stream(stream.residual, scaled, Squares(squares, n // tiling.block_n))

    def attend(
        self,
        qkv: Tensor,
        rows: DecodeRows,
        k_pages: Tensor,
        v_pages: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
    ) -> Tensor:
        """Rotates, writes K and V, and attends. qkv `[B, (H + 2 * H_kv) * D]`, norms of q and k `[D]` each.
        Returns `[B, H * D]`."""
        shape, batch = self._shape, len(rows.token)
        tiling = choose_attention_tiling(batch, shape.head_dim)
        out = torch.empty((batch, shape.num_heads, shape.head_dim), dtype=qkv.dtype, device=qkv.device)
        decode_attention(
            qkv,
            rows.cos,
            rows.sin,
            rows.write_index,
            rows.page_table,
            rows.work,
            k_pages,
            v_pages,
            out,
            self._joints,
            scale=shape.head_dim**-0.5,
            q_norm=norms[0] if norms is not None else None,
            k_norm=norms[1] if norms is not None else None,
            eps=eps,
            block_n=tiling.block_n,
            stages=tiling.stages,
            warps=tiling.warps,
            pdl=self._hopper,
        )
        return out.view(batch, -1)

    # -- inside ----------------------------------------------------------------------------------------

    def _product(self, product: Product, x: Tensor, w: LinearWeight, out: Tensor, **more: object) -> None:
        tiling = self._need(product, out.shape[1], x.shape[1], len(x))
        skinny_linear(
            x,
            w.weight,
            out,
            tiling,
            self._workspace,
            bias=w.bias,
            activation=self._shape.activation if product == "gated" else None,
            pdl=self._hopper,
            **more,  # type: ignore[arg-type]  # named arguments of skinny_linear, checked by the tests
        )

    def _need(self, product: Product, n: int, k: int, num_rows: int) -> Tiling:
        tiling = self._tiling(product, n, k, num_rows)
        assert tiling is not None, f"no tiles for {product} {n} x {k}, {num_rows} rows: ask `takes` first"
        return tiling

    def _tiling(self, product: Product, n: int, k: int, num_rows: int) -> Tiling | None:
        return choose_tiling(product, n, k, num_rows, hopper=self._hopper)


def _squares(num_parts: int, num_rows: int, device: torch.device) -> Tensor:
    """Rows are padded: kernels are compiled for their stride, and should not be for each batch size."""
    return torch.empty((num_parts, block_of_rows(num_rows)), dtype=torch.float32, device=device)


def _workspace(shape: DecodeShape, device: torch.device, hopper: bool) -> Workspace:
    """Room for the split sums of the largest product."""
    cells = tiles = 1
    for product, n, k in shape.products():
        for num_rows in (FEW_ROWS, MAX_ROWS):
            tiling = choose_tiling(product, n, k, num_rows, hopper=hopper)
            if tiling is not None and tiling.split_k > 1:
                both = 2 if product == "gated" else 1
                cells = max(cells, n * block_of_rows(num_rows) * tiling.split_k * both)
                tiles = max(tiles, n // tiling.block_n)
    return Workspace(device, max_cells=cells, max_tiles=tiles)

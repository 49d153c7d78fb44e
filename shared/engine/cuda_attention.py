"""Which attention kernels a step uses on CUDA, and their plans.

Decode rows and prompt chunks are planned apart: FlashInfer's FA2 (split over the keys, safe in graphs) for
the first, FA3 on Hopper for the second. Layers with a window, and everything with `--attention-backend
triton`, go to the Triton kernel. What the decode kernels take is not planned here (`decode_tables.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from phloem.kernels.flashinfer_ops.page_lists import PagedRows
from phloem.kernels.triton_ops.lane import TritonLane
from phloem.shared.model_store.model_config import ModelConfig

DeviceBackend: TypeAlias = Literal["flashinfer", "triton"]


class Part(Protocol):
    """A planned share of a step's rows."""

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float, out: Tensor) -> None: ...


class PlannedRows(NamedTuple):
    """A step's plan for the layers of one window: rows [0, num_decode) and the rest."""

    decode: Part | None
    chunks: Part | None
    num_decode: int

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        n = self.num_decode
        if self.decode is not None:
            self.decode.attend(q[:n], k_pages, v_pages, scale, out[:n])
        if self.chunks is not None:
            self.chunks.attend(q[n:], k_pages, v_pages, scale, out[n:])
        return out


class Lane(Protocol):
    """Plans one kind of rows."""

    def plan(self, rows: PagedRows, *, in_graph: bool) -> Part: ...


class CudaAttention:
    """The lanes of every window of a model: (decode rows, chunks of prompts)."""

    def __init__(self, lanes: Mapping[int, tuple[Lane, Lane]]) -> None:
        self._lanes = lanes

    def plan_decode(self, rows: PagedRows, *, in_graph: bool) -> dict[int, PlannedRows]:
        """One query per row."""
        return {
            window: PlannedRows(lanes[0].plan(rows, in_graph=in_graph), None, len(rows.slots))
            for window, lanes in self._lanes.items()
        }

    def plan_mixed(self, rows: PagedRows, num_decode: int) -> dict[int, PlannedRows]:
        """`num_decode` rows of one query each, then chunks."""
        n = num_decode
        plans = {}
        for window, (decode_lane, chunk_lane) in self._lanes.items():
            decode = chunks = None
            if n:
                decode = decode_lane.plan(_some(rows, slice(None, n)), in_graph=False)
            if n < len(rows.slots):
                chunks = chunk_lane.plan(_some(rows, slice(n, None)), in_graph=False)
            plans[window] = PlannedRows(decode, chunks, n)
        return plans


def _some(rows: PagedRows, part: slice) -> PagedRows:
    return PagedRows(rows.page_table, rows.slots[part], rows.query_lens[part], rows.kv_lens[part])


class _TritonRows:
    def __init__(self, lane: TritonLane, page_size: int) -> None:
        self._lane = lane
        self._page_size = page_size

    def plan(self, rows: PagedRows, *, in_graph: bool) -> Part:
        width = int(-(-rows.kv_lens.max() // self._page_size))
        table = rows.page_table[rows.slots, :width].astype(np.int64)
        return self._lane.plan(rows.query_lens, rows.kv_lens, table)


class AttentionSizes(NamedTuple):
    page_size: int
    max_rows: int
    max_pages: int  # of one row


def device_attention(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    backend: DeviceBackend,
    sizes: AttentionSizes,
) -> CudaAttention:
    """Layers with a window go to the Triton kernel whatever the backend."""
    lanes: dict[int, tuple[Lane, Lane]] = {}
    for window in sorted(set(config.layer_windows)):
        if backend == "flashinfer" and not window:
            lanes[window] = _flashinfer_lanes(config, dtype, device, sizes)
        else:
            decode, chunks = (
                TritonLane(device, window=window, max_rows=sizes.max_rows, max_pages=sizes.max_pages)
                for _ in range(2)
            )
            lanes[window] = (_TritonRows(decode, sizes.page_size), _TritonRows(chunks, sizes.page_size))
    return CudaAttention(lanes)


def _flashinfer_lanes(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, sizes: AttentionSizes
) -> tuple[Lane, Lane]:
    from phloem.kernels.flashinfer_ops.attention import (
        FLOAT_WORKSPACE_BYTES,
        AttentionShape,
        FlashInferLane,
    )

    shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, sizes.page_size, dtype)
    workspace = torch.zeros(FLOAT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    # Rows may share pages: together they list more than the pool has.
    max_indices = sizes.max_rows * sizes.max_pages
    decode = FlashInferLane(
        shape, device, workspace, backend="fa2", max_rows=sizes.max_rows, max_indices=max_indices
    )
    chunks = FlashInferLane(
        shape,
        device,
        workspace,
        backend="fa3" if hopper else "fa2",
        max_rows=sizes.max_rows,
        max_indices=max_indices,
    )
    return decode, chunks

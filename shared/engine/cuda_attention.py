"""Which attention kernels a step uses on CUDA, and their plans.

Decode rows and prompt chunks are planned apart: FlashInfer's FA2 (split over the keys, safe in graphs) for
the first, FA3 on Hopper for the second. Layers with a window, and everything with `--attention-backend
triton`, go to the Triton kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phloem.kernels.triton_ops.lane import TritonLane
from phloem.shared.model_store.model_config import ModelConfig

if TYPE_CHECKING:
    from phloem.kernels.flashinfer_ops.attention import FlashInferLane

Int64Array: TypeAlias = npt.NDArray[np.int64]
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


class Sequences(NamedTuple):
    """Some rows of a step: page_table `[B, max_pages]` of page ids, query_lens and kv_lens `[B]`."""

    page_table: Int64Array
    query_lens: Int64Array
    kv_lens: Int64Array


class Lane(Protocol):
    """Plans one kind of rows."""

    def plan(self, sequences: Sequences, *, in_graph: bool) -> Part: ...


class _TritonRows:
    def __init__(self, lane: TritonLane, page_size: int) -> None:
        self._lane = lane
        self._page_size = page_size

    def plan(self, sequences: Sequences, *, in_graph: bool) -> Part:
        width = int(-(-sequences.kv_lens.max() // self._page_size))
        return self._lane.plan(sequences.query_lens, sequences.kv_lens, sequences.page_table[:, :width])


class CudaAttention:
    """The lanes of every window of a model."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        page_size: int,
        backend: DeviceBackend,
        max_rows: int,
        max_pages: int,
        num_pages: int,
    ) -> None:
        self._page_size = page_size
        self._windows = sorted(set(config.layer_windows))
        self._lanes: dict[int, tuple[Lane, Lane]] = {}
        for window in self._windows:
            if backend == "flashinfer" and not window:
                self._lanes[window] = _flashinfer_lanes(
                    config, dtype, device, page_size, max_rows, min(max_rows * max_pages, 4 * num_pages)
                )
            else:
                lanes = [
                    TritonLane(device, window=window, max_rows=max_rows, max_pages=max_pages)
                    for _ in range(2)
                ]
                self._lanes[window] = (_TritonRows(lanes[0], page_size), _TritonRows(lanes[1], page_size))

    def plan_decode(
        self, page_ids: Int64Array, slots: Int64Array, kv_lens: Int64Array, *, in_graph: bool
    ) -> dict[int, PlannedRows]:
        """One query per slot. page_ids `[num_slots, max_pages]` is the slot table."""
        sequences = self._sequences(page_ids, slots, np.ones(len(slots), dtype=np.int64), kv_lens)
        return {
            window: PlannedRows(lanes[0].plan(sequences, in_graph=in_graph), None, len(slots))
            for window, lanes in self._lanes.items()
        }

    def plan_mixed(
        self,
        page_ids: Int64Array,
        slots: Int64Array,
        query_lens: Int64Array,
        kv_lens: Int64Array,
        num_decode: int,
    ) -> dict[int, PlannedRows]:
        """`num_decode` rows of one query each, then chunks."""
        n = num_decode
        plans = {}
        for window, (decode_lane, chunk_lane) in self._lanes.items():
            decode = chunks = None
            if n:
                head = self._sequences(page_ids, slots[:n], query_lens[:n], kv_lens[:n])
                decode = decode_lane.plan(head, in_graph=False)
            if n < len(slots):
                tail = self._sequences(page_ids, slots[n:], query_lens[n:], kv_lens[n:])
                chunks = chunk_lane.plan(tail, in_graph=False)
            plans[window] = PlannedRows(decode, chunks, n)
        return plans

    def _sequences(
        self, page_ids: Int64Array, slots: Int64Array, query_lens: Int64Array, kv_lens: Int64Array
    ) -> Sequences:
        width = int(-(-kv_lens.max() // self._page_size))
        return Sequences(page_ids[slots, :width], query_lens, kv_lens)


class _FlashInferRows:
    def __init__(self, lane: FlashInferLane, page_size: int) -> None:
        self._lane = lane
        self._page_size = page_size

    def plan(self, sequences: Sequences, *, in_graph: bool) -> Part:
        from phloem.kernels.flashinfer_ops.attention import RaggedPages

        num_pages = -(-sequences.kv_lens // self._page_size)
        width = sequences.page_table.shape[1]
        used = np.arange(width) < num_pages[:, None]
        return self._lane.plan(
            RaggedPages(
                _indptr(sequences.query_lens),
                _indptr(num_pages),
                sequences.kv_lens.astype(np.int32),
                sequences.page_table[used].astype(np.int32),
            ),
            in_graph=in_graph,
        )


def _indptr(lengths: Int64Array) -> npt.NDArray[np.int32]:
    out = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=out[1:])
    return out


def _flashinfer_lanes(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    page_size: int,
    max_rows: int,
    max_indices: int,
) -> tuple[Lane, Lane]:
    from phloem.kernels.flashinfer_ops.attention import (
        FLOAT_WORKSPACE_BYTES,
        AttentionShape,
        FlashInferLane,
    )

    shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, page_size, dtype)
    workspace = torch.zeros(FLOAT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    decode = FlashInferLane(
        shape, device, workspace, backend="fa2", max_rows=max_rows, max_indices=max_indices
    )
    chunks = FlashInferLane(
        shape,
        device,
        workspace,
        backend="fa3" if hopper else "fa2",
        max_rows=max_rows,
        max_indices=max_indices,
    )
    return _FlashInferRows(decode, page_size), _FlashInferRows(chunks, page_size)

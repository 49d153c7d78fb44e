"""Paged attention by FlashInfer, planned on the host without waiting for the device.

FlashInfer's wrapper classes copy page indices from the host synchronously and loop over tensors in Python;
so this calls the two functions under them, `plan` and `paged_run`, whose signatures hold for the pinned
version. Everything a plan needs goes to the device in one copy from pinned memory. Two pinned buffers take
turns: step N + 1 is planned while step N runs, never while N - 1 does.

    device buffer (int32):  [ qo_indptr | kv_indptr | last_page_len | page indices ... ]
                              max_rows+1  max_rows+1  max_rows        max_indices
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from flashinfer.prefill import get_batch_prefill_module
from flashinfer.utils import MaskMode, TensorLayout, _get_cache_alibi_slopes_buf
from torch import Tensor

INT_WORKSPACE_BYTES = 16 * 1024 * 1024
FLOAT_WORKSPACE_BYTES = 384 * 1024 * 1024

Int32Array = npt.NDArray[np.int32]


class RaggedPages(NamedTuple):
    """Sequences of one step and their pages, on the host.

    qo_indptr int32 `[B + 1]`: rows of q by sequence; kv_indptr int32 `[B + 1]`: its range in `indices`;
    kv_lens int32 `[B]`: tokens visible to the last query; indices int32 `[N]`: page ids.
    """

    qo_indptr: Int32Array
    kv_indptr: Int32Array
    kv_lens: Int32Array
    indices: Int32Array


class AttentionShape(NamedTuple):
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype


class FlashInferPlan(NamedTuple):
    """A planned step: `attend` runs it for one layer, also inside a CUDA graph."""

    lane: FlashInferLane
    plan_info: Any  # what FlashInfer's plan returned: opaque
    batch: int

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float, out: Tensor) -> None:
        self.lane.run(self, q, k_pages, v_pages, scale, out)


class FlashInferLane:
    """One kind of rows (decode, or prompt chunks) with workspaces of its own, reused by every step.

    `backend`: "fa2" (any GPU since Ampere; safe in CUDA graphs) or "fa3" (Hopper, prompts).
    """

    def __init__(
        self,
        shape: AttentionShape,
        device: torch.device,
        float_workspace: Tensor,
        *,
        backend: Literal["fa2", "fa3"],
        max_rows: int,
        max_indices: int,
    ) -> None:
        self._shape = shape
        self._backend = backend
        self._device = device
        self._float_workspace = float_workspace
        self._max_rows = max_rows
        self._header = 3 * max_rows + 2
        self._int_workspace = torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._pinned_workspaces = [
            torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)
        ]
        size = self._header + max_indices
        self._buffer = torch.zeros(size, dtype=torch.int32, device=device)
        self._pinned = [torch.zeros(size, dtype=torch.int32, pin_memory=True) for _ in range(2)]
        self._turn = 0
        self._module = get_batch_prefill_module(
            backend,
            shape.dtype,
            shape.dtype,
            shape.dtype,
            torch.int32,
            shape.head_dim,
            shape.head_dim,
            0,  # no positional encoding: q and k come rotated
            False,  # no window
            False,  # no soft cap
            False,  # no fp16 reduction
        )

    def plan(self, pages: RaggedPages, *, in_graph: bool) -> FlashInferPlan:
        """Plans a step; with `in_graph` for the replay of a graph captured with as many sequences.

        Nothing waits: the copies are ordered on the current stream.
        """
        self._turn ^= 1
        batch = len(pages.kv_lens)
        last = (pages.kv_lens - 1) % self._shape.page_size + 1
        host = self._pinned[self._turn].numpy()
        rows, n = self._max_rows, len(pages.indices)
        host[: batch + 1] = pages.qo_indptr
        host[rows + 1 : rows + 2 + batch] = pages.kv_indptr
        host[2 * rows + 2 : 2 * rows + 2 + batch] = last
        host[self._header : self._header + n] = pages.indices
        end = self._header + n
        self._buffer[:end].copy_(self._pinned[self._turn][:end], non_blocking=True)
        num_rows = int(pages.qo_indptr[-1])
        shape = self._shape
        arguments: list[Any] = [
            self._float_workspace,
            self._int_workspace,
            self._pinned_workspaces[self._turn],
            torch.from_numpy(pages.qo_indptr),
            torch.from_numpy(pages.kv_indptr),
            torch.from_numpy(pages.kv_lens),
            num_rows,
            batch,
            shape.num_qo_heads,
            shape.num_kv_heads,
            shape.page_size,
            in_graph,
            shape.head_dim,
            shape.head_dim,
            True,  # causal
            -1,  # no window
        ]
        if self._backend == "fa2":
            arguments += [-1, False, 0]  # no fixed split, split allowed, no colocated CTAs
        return FlashInferPlan(self, self._module.plan(*arguments), batch)

    def run(
        self, plan: FlashInferPlan, q: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float, out: Tensor
    ) -> None:
        """Attention of one layer; q and out `[rows, H, D]`, pages `[num_pages, page_size, H_kv, D]`."""
        rows, batch = self._max_rows, plan.batch
        self._module.paged_run(
            self._float_workspace,
            self._int_workspace,
            plan.plan_info,
            q,
            k_pages,
            v_pages,
            self._buffer[: batch + 1],
            self._buffer[rows + 1 : rows + 2 + batch],
            self._buffer[self._header :],
            self._buffer[2 * rows + 2 : 2 * rows + 2 + batch],
            out,
            None,  # no log-sum-exp
            MaskMode.CAUSAL.value,
            TensorLayout.NHD.value,
            -1,  # no window
            False,  # no programmatic dependent launch
            None,
            None,
            _get_cache_alibi_slopes_buf(q.shape[1], q.device),
            None,
            None,
            None,
            0.0,  # no soft cap
            scale,
            None,
            None,
            None,
            1.0,
            1e4,
            0,
            0,
        )

"""Paged attention by FlashInfer, planned on the host without waiting for the device.

FlashInfer's wrapper classes copy page indices from the host synchronously and loop over tensors in Python;
so this calls the two functions under them, `plan` and `paged_run`, whose signatures hold for the pinned
version. `PageLists` brings to the device what both read. Two pinned workspaces take turns: step N + 1 is
planned while step N runs, never while N - 1 does.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from flashinfer.prefill import get_batch_prefill_module
from flashinfer.utils import MaskMode, TensorLayout, _get_cache_alibi_slopes_buf
from torch import Tensor

from phloem.kernels.flashinfer_ops.page_lists import PagedRows, PageLists

INT_WORKSPACE_BYTES = 16 * 1024 * 1024
FLOAT_WORKSPACE_BYTES = 384 * 1024 * 1024


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
        self._lists = PageLists(device, page_size=shape.page_size, max_rows=max_rows, max_indices=max_indices)
        self._plan: FlashInferPlan | None = None
        self._planned_in_graph = False
        self._int_workspace = torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._pinned_workspaces = [
            torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)
        ]
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

    def plan(self, rows: PagedRows, *, in_graph: bool) -> FlashInferPlan:
        """Plans a step; with `in_graph` for the replay of a graph captured with as many sequences.

        Nothing waits: the copies are ordered on the current stream. FA2's plan depends on the numbers of
        pages only: while no row of the same rows needs another page, the plan on the device stays right.
        """
        changed = self._lists.update(rows)
        reusable = self._backend == "fa2" and in_graph == self._planned_in_graph
        if changed or self._plan is None or not reusable:
            self._plan = FlashInferPlan(self, self._plan_anew(in_graph))
            self._planned_in_graph = in_graph
        return self._plan

    def _plan_anew(self, in_graph: bool) -> Any:
        self._turn ^= 1
        lists, shape = self._lists, self._shape
        arguments: list[Any] = [
            self._float_workspace,
            self._int_workspace,
            self._pinned_workspaces[self._turn],
            torch.from_numpy(lists.qo_indptr),
            torch.from_numpy(lists.kv_indptr),
            torch.from_numpy(lists.kv_lens),
            int(lists.qo_indptr[-1]),
            len(lists.kv_lens),
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
        return self._module.plan(*arguments)

    def run(
        self, plan: FlashInferPlan, q: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float, out: Tensor
    ) -> None:
        """Attention of one layer; q and out `[rows, H, D]`, pages `[num_pages, page_size, H_kv, D]`."""
        self._module.paged_run(
            self._float_workspace,
            self._int_workspace,
            plan.plan_info,
            q,
            k_pages,
            v_pages,
            self._lists.device_qo_indptr,
            self._lists.device_kv_indptr,
            self._lists.device_indices,
            self._lists.device_last_page_len,
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

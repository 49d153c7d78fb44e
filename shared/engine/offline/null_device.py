"""A device that computes nothing: what is left of a step is the host's work, and that runs without a GPU.

The inputs are planned and copied as for CUDA and its decode kernels; only what CUDA and FlashInfer themselves
would do is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from phloem.kernels.flashinfer_ops.page_lists import PagedRows, PageLists
from phloem.shared.engine.cuda_attention import CudaAttention
from phloem.shared.engine.decode_tables import DecodeTables
from phloem.shared.engine.grammar.masks import TokenMasks
from phloem.shared.engine.step_inputs import RunnerSizes, StepInputs
from phloem.shared.engine.step_plan import StepPlan

CPU = torch.device("cpu")
_TOKEN = 7
_KV_HEADS = 8


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


class _NullPart:
    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float, out: Tensor) -> None:
        raise AssertionError("nothing is computed here")


class NullLane:
    """Keeps a FlashInfer lane's page lists, and plans nothing with them."""

    def __init__(self, sizes: RunnerSizes) -> None:
        self.lists = PageLists(
            CPU,
            page_size=sizes.page_size,
            max_rows=sizes.num_slots,
            max_indices=sizes.num_slots * sizes.max_pages,
        )
        self._part = _NullPart()

    def plan(self, rows: PagedRows, *, in_graph: bool) -> _NullPart:
        self.lists.update(rows)
        return self._part


class NullStep:
    """All rows make the same token; rows with a mask, the first that is allowed."""

    def __init__(self, runner: NullRunner, num_tokens: int) -> None:
        self._runner = runner
        self._number = runner.num_launched
        self._token_ids = [_TOKEN] * num_tokens
        self._ends_s: float | None = None  # None: it is not sampled yet

    def sample(self, masks: TokenMasks | None = None) -> None:
        self._ends_s = self._runner.occupy(0.0)
        if masks is not None:
            for row, token_id in zip(masks.rows.tolist(), _first_allowed(masks.bitmask), strict=True):
                self._token_ids[row] = token_id

    def ready(self) -> bool:
        if self._ends_s is None:
            return False
        if not self._runner.step_s:  # at once, but never before the step behind it was launched
            return self._runner.num_launched > self._number
        return self._runner.clock() >= self._ends_s

    def token_ids(self) -> list[int]:
        while self._runner.step_s and not self.ready():
            time.sleep(0)
        return self._token_ids


class NullRunner:
    """A runner whose steps take `step_s` on the device, one after the other; 0: none at all.

    `idle_s` sums up how long the device had nothing to do between steps, and between a step's forward pass
    and its sampling.
    """

    def __init__(
        self, sizes: RunnerSizes, *, step_s: float = 0.0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock = clock
        attention = CudaAttention({0: (NullLane(sizes), NullLane(sizes))})
        self.tables = DecodeTables(
            CPU,
            num_slots=sizes.num_slots + 1,
            max_pages=sizes.max_pages,
            page_size=sizes.page_size,
            num_kv_heads=_KV_HEADS,
        )
        self.inputs = StepInputs(attention, CPU, sizes, _copy, self.tables)
        self.step_s = step_s
        self.num_launched = 0
        self.idle_s = 0.0
        self._free_s = 0.0  # when the device is done with all that it was given

    @torch.inference_mode()
    def launch(self, plan: StepPlan, watch: object = None) -> NullStep:
        del watch  # there are no layers
        if plan.decode is not None:
            num_tokens = self.inputs.decode(plan.decode, plan.num_rows, 0).num_rows
        else:
            sampled = self.inputs.mixed(plan.rows, 0).sampled
            num_tokens = sampled.num_rows if sampled is not None else 0
        self.occupy(self.step_s)
        self.num_launched += 1
        step = NullStep(self, num_tokens)
        if not plan.constrained:
            step.sample()
        return step

    def occupy(self, seconds: float) -> float:
        """Gives the device so much to do behind what it has; when it will be done."""
        now_s = self.clock()
        self.idle_s += max(0.0, now_s - self._free_s)
        self._free_s = max(now_s, self._free_s) + seconds
        return self._free_s


def _first_allowed(bitmask: Tensor) -> list[int]:
    """The lowest allowed token of each row; every row allows one."""
    words = bitmask.numpy()
    columns = (words != 0).argmax(axis=1)
    bits = words[range(len(words)), columns].astype(np.uint32)
    lowest = np.bitwise_count((bits & -bits) - np.uint32(1))
    return [int(column) * 32 + int(bit) for column, bit in zip(columns, lowest, strict=True)]

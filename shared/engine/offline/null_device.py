"""A device that computes nothing: what is left of a step is the host's work, and that runs without a GPU.

The inputs are planned and copied as for CUDA; only what CUDA and FlashInfer themselves would do is missing.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from phloem.kernels.flashinfer_ops.page_lists import PagedRows, PageLists
from phloem.shared.engine.cuda_attention import CudaAttention
from phloem.shared.engine.grammar.masks import TokenMasks
from phloem.shared.engine.step_inputs import RunnerSizes, StepInputs
from phloem.shared.engine.step_plan import StepPlan

CPU = torch.device("cpu")


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
    def __init__(self, runner: NullRunner, num_tokens: int, ends_s: float) -> None:
        self._runner = runner
        self._number = runner.num_launched
        self._num_tokens = num_tokens
        self._ends_s = ends_s

    def ready(self) -> bool:
        if not self._runner.step_s:  # at once, but never before the step behind it was launched
            return self._runner.num_launched > self._number
        return time.perf_counter() >= self._ends_s

    def sample(self, masks: TokenMasks) -> None:
        del masks  # there are no logits

    def token_ids(self) -> list[int]:
        while not self.ready() and self._runner.step_s:
            time.sleep(0)
        return [7] * self._num_tokens


class NullRunner:
    """A runner whose steps take `step_s` on the device, one after the other; 0: none at all.

    `idle_s` sums up how long the device had nothing to do between steps.
    """

    def __init__(self, sizes: RunnerSizes, *, step_s: float = 0.0) -> None:
        self.attention = CudaAttention({0: (NullLane(sizes), NullLane(sizes))})
        self.inputs = StepInputs(self.attention, CPU, sizes)
        self.step_s = step_s
        self.num_launched = 0
        self.idle_s = 0.0
        self._ends_s = 0.0  # of the last step

    @torch.inference_mode()
    def launch(self, plan: StepPlan, watch: object = None) -> NullStep:
        del watch  # there are no layers
        if plan.decode is not None:
            num_tokens = self.inputs.decode(plan.decode, plan.num_rows).num_rows
        else:
            sampled = self.inputs.mixed(plan.rows).sampled
            num_tokens = sampled.num_rows if sampled is not None else 0
        now_s = time.perf_counter()
        self.idle_s += max(0.0, now_s - self._ends_s)
        self._ends_s = max(now_s, self._ends_s) + self.step_s
        self.num_launched += 1
        return NullStep(self, num_tokens, self._ends_s)

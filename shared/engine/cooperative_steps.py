"""Decode steps of kernels whose blocks wait for each other, while nobody else runs kernels on the device.

All blocks of such a launch are resident at once, one on each multiprocessor. A KV transfer holds some of
them, and one with a peer that hangs holds them until its deadline: while channels are there, steps are made
of other kernels (`decode_pass.py`), a little slower.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from phloem.kernels import ops
from phloem.kernels.triton_ops.key_shares import MANY, Sharing
from phloem.kernels.types import CudaError, DecodeRows
from phloem.shared.engine.models.decode_pass import decode_shape, step_weights

if TYPE_CHECKING:
    from phloem.kernels.triton_ops.decode_kernels import DecodeKernels
    from phloem.shared.engine.runners import LoadedModel

log = logging.getLogger(__name__)


class CooperativeStep(Protocol):
    """Of one model over one KV cache. `sharing`: of the rows' keys, that suits it."""

    sharing: Sharing

    def takes(self, num_rows: int) -> bool: ...

    def __call__(self, rows: DecodeRows) -> Tensor: ...


class CooperativeSteps:
    """`steps`: the first that takes so many rows makes them. `is_alone` is asked for every step: whether no
    channel is there, or what is left of one."""

    def __init__(self, steps: Sequence[CooperativeStep], is_alone: Callable[[], bool]) -> None:
        self._steps = steps
        self._is_alone = is_alone

    def takes(self, num_rows: int) -> bool:
        """Whether there is a graph for so many rows."""
        return self._find(num_rows) is not None

    def is_due(self, num_rows: int) -> bool:
        """Whether a step of so many rows should be made here now."""
        return self.takes(num_rows) and self._is_alone()

    def sharing(self, num_rows: int) -> Sharing:
        """Of the rows' keys. All kernels can read each other's work: no more than time depends on it."""
        step = self._find(num_rows)
        return step.sharing if step is not None and self._is_alone() else MANY

    def forward(self, rows: DecodeRows) -> Tensor:
        """Writes the rows' K and V into their pages. Returns float32 logits, `[B, vocab]`."""
        step = self._find(len(rows.token))
        assert step is not None, "ask `takes` first"
        return step(rows)

    def _find(self, num_rows: int) -> CooperativeStep | None:
        return next((step for step in self._steps if step.takes(num_rows)), None)


def make_cooperative_steps(
    model: LoadedModel, kernels: DecodeKernels, is_alone: Callable[[], bool]
) -> CooperativeSteps | None:
    """None where the device, the model or the compiler has no such steps; a compiler that fails is told."""
    shape, weights = decode_shape(model.decoder.config), step_weights(model.decoder)

    def one_launch() -> CooperativeStep | None:
        plan = ops.plan_decode_step(shape, model.dtype, model.device)
        return ops.decode_step(shape, weights, model.kv, plan) if plan is not None else None

    def chain() -> CooperativeStep | None:
        plans = ops.plan_chain_step(shape, model.dtype, model.device)
        return ops.chain_step(shape, weights, model.kv, plans, kernels) if plans is not None else None

    steps = steps_of((one_launch, chain))
    return CooperativeSteps(steps, is_alone) if steps else None


def steps_of(makers: Iterable[Callable[[], CooperativeStep | None]]) -> list[CooperativeStep]:
    """What they make. Where the compiler or the driver refuses one, other kernels make its steps."""
    steps = []
    for make in makers:
        try:
            if (step := make()) is not None:
                steps.append(step)
        except (CudaError, ImportError, AttributeError) as error:
            log.warning(
                "decode steps of few requests are a bit slower: %s; --disable-cooperative-decode silences it",
                error,
            )
    return steps

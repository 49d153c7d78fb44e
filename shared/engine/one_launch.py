"""Decode steps of few rows in one launch, as long as nobody else runs kernels on the device.

All blocks of such a step wait for each other, one on each multiprocessor. A KV transfer holds some of them,
and one with a peer that hangs holds them until its deadline: while channels are open, steps are several
launches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from phloem.kernels import ops
from phloem.kernels.triton_ops.key_shares import MANY, ONE_EACH, Sharing
from phloem.kernels.types import CudaError, DecodeRows
from phloem.shared.engine.models.decode_pass import decode_shape, step_weights

if TYPE_CHECKING:
    from phloem.kernels.hopper_ops.decode_step import OneLaunchStep
    from phloem.shared.engine.runners import LoadedModel

log = logging.getLogger(__name__)


class OneLaunch:
    """`is_alone` is asked for every step: whether no channel is open."""

    def __init__(self, step: OneLaunchStep, is_alone: Callable[[], bool]) -> None:
        self._step = step
        self._is_alone = is_alone

    def takes(self, num_rows: int) -> bool:
        """Whether there is a graph for so many rows."""
        return self._step.takes(num_rows)

    def is_due(self, num_rows: int) -> bool:
        """Whether a step of so many rows should be one launch now."""
        return self._step.takes(num_rows) and self._is_alone()

    def sharing(self, num_rows: int) -> Sharing:
        """Of the rows' keys. Either kernel can read the other's work: no more than time depends on it."""
        return ONE_EACH if self.is_due(num_rows) else MANY

    def forward(self, rows: DecodeRows) -> Tensor:
        """Writes the rows' K and V into their pages. Returns float32 logits, `[B, vocab]`."""
        return self._step(rows)


def make_one_launch(model: LoadedModel, is_alone: Callable[[], bool]) -> OneLaunch | None:
    """None where the device, the model or the compiler has no such step; a compiler that fails is told."""
    shape = decode_shape(model.decoder.config)
    plan = ops.plan_decode_step(shape, model.dtype, model.device)
    if plan is None:
        return None
    try:
        step = ops.decode_step(shape, step_weights(model.decoder), model.kv, plan)
    except (CudaError, ImportError, AttributeError) as error:
        log.warning(
            "decode steps are several launches, a little slower: %s; --disable-one-launch-decode silences it",
            error,
        )
        return None
    return OneLaunch(step, is_alone)

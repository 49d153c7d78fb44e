"""The stand-in device of the host's benchmark: what it counts as idle, and its tokens under a mask."""

from __future__ import annotations

import torch

from phloem.shared.engine.grammar.masks import TokenMasks
from phloem.shared.engine.offline.null_device import NullRunner, NullStep
from phloem.shared.engine.step_inputs import RunnerSizes

SIZES = RunnerSizes(4, 8, 16, 4, 99)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_device_is_idle_only_while_it_has_nothing_to_do() -> None:
    clock = Clock()
    runner = NullRunner(SIZES, step_s=2.0, clock=clock)
    runner.occupy(2.0)
    idle_s = runner.idle_s
    clock.now_s += 1.0
    assert runner.occupy(2.0) == 104.0
    assert runner.idle_s == idle_s, "it was given more before it was done"
    clock.now_s = 105.5
    assert runner.occupy(2.0) == 107.5
    assert runner.idle_s == idle_s + 1.5


def test_late_sampling_leaves_the_device_idle_and_the_step_unready() -> None:
    clock = Clock()
    runner = NullRunner(SIZES, step_s=2.0, clock=clock)
    runner.occupy(2.0)
    step, idle_s = NullStep(runner, 1), runner.idle_s
    clock.now_s += 3.0
    assert not step.ready(), "it is not sampled"
    step.sample()
    assert step.ready() and runner.idle_s == idle_s + 1.0


def test_masked_rows_make_the_first_allowed_token() -> None:
    step = NullStep(NullRunner(SIZES), 3)
    bitmask = torch.tensor([[0, -(2**31)], [0b1010, 1]], dtype=torch.int32)
    step.sample(TokenMasks(torch.tensor([2, 0]), bitmask))
    assert step.token_ids() == [1, 7, 63]

"""The real engine process on the CPU, over a device that never ends its step number `STALLED_STEP`."""

from __future__ import annotations

import functools

import torch

from phloem.shared.engine import assembly, main
from phloem.shared.engine.grammar.masks import TokenMasks
from phloem.shared.engine.step_plan import StepPlan
from phloem.shared.engine.step_runner import LaunchedStep, LayerWatch, StepRunner
from phloem.shared.process_end import end_process

STALLED_STEP = 4  # counted from the first request


class EndlessStep:
    """Launched, and never heard of again."""

    def ready(self) -> bool:
        return False

    def token_ids(self) -> list[int]:
        raise AssertionError("nobody waits for a step that is not ready")

    def sample(self, masks: TokenMasks) -> None:
        raise AssertionError("nobody asks for a grammar here")


class StallingRunner:
    """Hands steps on until one is due that the device never ends."""

    def __init__(self, runner: StepRunner, device: torch.device) -> None:
        del device
        self._runner = runner
        self._num_launched = 0

    def launch(self, plan: StepPlan, watch: LayerWatch | None = None) -> LaunchedStep:
        self._num_launched += 1
        if self._num_launched >= STALLED_STEP:
            return EndlessStep()
        return self._runner.launch(plan, watch)


if __name__ == "__main__":
    assembly.build_engine = functools.partial(assembly.build_engine, observe=StallingRunner)
    end_process(main.main())

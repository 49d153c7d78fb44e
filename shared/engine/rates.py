"""Moving averages of what this engine achieves; heartbeats carry them to the routers."""

from __future__ import annotations

from phloem.shared.engine.step_plan import StepPlan

_WEIGHT = 0.2  # of the newest sample
_MIN_PROMPT_TOKENS = 16  # fewer say nothing about the prefill rate


class Rates:
    """Zero until measured."""

    def __init__(self) -> None:
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0

    def observe(self, plan: StepPlan, elapsed_s: float) -> None:
        """A step took `elapsed_s` on the device."""
        prompt_tokens = sum(row.num_tokens for row in plan.chunks)
        if prompt_tokens >= _MIN_PROMPT_TOKENS and elapsed_s > 0:
            self.prefill_tokens_per_s = _mix(self.prefill_tokens_per_s, prompt_tokens / elapsed_s)
        elif prompt_tokens == 0:
            self.decode_step_s = _mix(self.decode_step_s, elapsed_s)


def _mix(average: float, sample: float) -> float:
    return sample if average == 0.0 else (1 - _WEIGHT) * average + _WEIGHT * sample

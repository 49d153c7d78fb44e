"""Steps that the device was given and that are not collected: one runs, the next waits behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from phloem.shared.engine.grammar.grammars import Grammars
from phloem.shared.engine.rates import Rates
from phloem.shared.engine.step_plan import StepPlan
from phloem.shared.engine.step_runner import LaunchedStep, LayerWatch, StepRunner
from phloem.shared.errors import PhloemError

MAX_IN_FLIGHT = 2


class _InFlight(NamedTuple):
    plan: StepPlan
    step: LaunchedStep
    launched_at_s: float


class StepsInFlight:
    """Launches and collects, in order. A step with grammars is sampled as soon as it is the oldest: all
    tokens before it are known then, and the device is in the middle of its forward pass."""

    def __init__(
        self,
        runner: StepRunner,
        grammars: Grammars,
        rates: Rates,
        clock: Callable[[], float],
        *,
        overlap: bool,
        hang_timeout_s: float = 120.0,
    ) -> None:
        self._max_in_flight = MAX_IN_FLIGHT if overlap else 1
        self._runner = runner
        self._grammars = grammars
        self._rates = rates
        self._clock = clock
        self._hang_timeout_s = hang_timeout_s
        self._steps: deque[_InFlight] = deque()
        self._collected_at_s = 0.0  # of the step before: a device that runs ahead begins the next one then

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def has_room(self) -> bool:
        return len(self._steps) < self._max_in_flight

    def oldest_is_ready(self) -> bool:
        return bool(self._steps) and self._steps[0].step.ready()

    def launch(self, plan: StepPlan, watch: LayerWatch | None) -> None:
        launched_at_s = self._clock()
        self._steps.append(_InFlight(plan, self._runner.launch(plan, watch), launched_at_s))
        if len(self._steps) == 1:
            self._sample_oldest()

    def collect(self, take: Callable[[StepPlan, list[int], float], None]) -> None:
        """Gives `take` the oldest step's plan, its tokens and the time; waits for the device if it must."""
        plan, step, launched_at_s = self._steps.popleft()
        token_ids = step.token_ids()
        now_s = self._clock()
        self._rates.observe(plan, now_s - max(launched_at_s, self._collected_at_s))
        self._collected_at_s = now_s
        take(plan, token_ids, now_s)
        if self._steps:
            self._sample_oldest()

    def check_hang(self, now_s: float) -> None:
        """Raises `device_hung` when the oldest step is not ready, long after the device could begin it."""
        if not self._steps or self._steps[0].step.ready():
            return
        plan, _, launched_at_s = self._steps[0]
        if now_s - max(launched_at_s, self._collected_at_s) > self._hang_timeout_s:
            raise PhloemError(
                "device_hung",
                f"a step of {plan.num_rows} requests has not ended after {self._hang_timeout_s:g} s: "
                "the device hangs. This worker ends and its requests go on elsewhere; look for errors of the "
                "device in `dmesg` (NVRM: Xid), or raise --engine-hang-timeout-s if steps do take so long",
                retryable=True,
                http_status=503,
                retry_after_s=1.0,
            )

    def _sample_oldest(self) -> None:
        plan, step, _ = self._steps[0]
        if plan.constrained:
            step.sample(self._grammars.masks(plan))

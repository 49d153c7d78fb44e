"""Looks at a runner from outside: how long the host works per step, how long the device idles between."""

from __future__ import annotations

import itertools
import time

import torch

from phloem.shared.engine.grammar.masks import TokenMasks
from phloem.shared.engine.step_plan import StepPlan
from phloem.shared.engine.step_runner import LaunchedStep, LayerWatch, StepRunner


class Launch:
    """One launched step; the events lie before and after its work on the device. Of a step that is sampled
    in a second phase, `held` lies after the first and `resumed` before the second."""

    def __init__(self, num_rows: int, begin: torch.cuda.Event | None) -> None:
        self.num_rows = num_rows
        self.begin = begin
        self.held: torch.cuda.Event | None = None
        self.resumed: torch.cuda.Event | None = None
        self.end: torch.cuda.Event | None = None

    def idle_ms_before(self, later: Launch) -> float:
        """Between this step and the one after it, and within this one."""
        assert self.end is not None and later.begin is not None
        between = max(0.0, float(self.end.elapsed_time(later.begin)))
        if self.held is None or self.resumed is None:
            return between
        return between + max(0.0, float(self.held.elapsed_time(self.resumed)))


class TimedStep:
    """Counts the time spent waiting for the device."""

    def __init__(self, step: LaunchedStep, timer: TimedRunner, launch: Launch) -> None:
        self._step = step
        self._timer = timer
        self._launch = launch

    def ready(self) -> bool:
        ready = self._step.ready()
        self._timer.polled(ready)
        return ready

    def sample(self, masks: TokenMasks) -> None:
        self._launch.resumed = self._timer.mark()
        self._step.sample(masks)
        self._launch.end = self._timer.mark()

    def token_ids(self) -> list[int]:
        start = time.perf_counter()
        tokens = self._step.token_ids()
        self._timer.waited_s += time.perf_counter() - start
        return tokens


class TimedRunner:
    """A runner around a runner. `reset` before a measurement, `idle_percent` after it."""

    def __init__(self, runner: StepRunner, device: torch.device) -> None:
        self._runner = runner
        self._cuda = device.type == "cuda"
        self._waiting_since_s: float | None = None
        self.waited_s = 0.0
        self.marking_s = 0.0  # spent on the events of this measurement
        self.launches: list[Launch] = []

    def reset(self) -> None:
        self.waited_s = self.marking_s = 0.0
        self.launches = []

    def launch(self, plan: StepPlan, watch: LayerWatch | None = None) -> TimedStep:
        self._waiting_since_s = None  # whoever polled before has worked since
        launch = Launch(plan.num_rows, self.mark())
        step = self._runner.launch(plan, watch)
        if plan.constrained:
            launch.held = self.mark()
        else:
            launch.end = self.mark()
        self.launches.append(launch)
        return TimedStep(step, self, launch)

    def polled(self, ready: bool) -> None:
        """A step was asked whether it is ready: from the first no to the yes the engine waits."""
        now_s = time.perf_counter()
        if not ready:
            self._waiting_since_s = self._waiting_since_s or now_s
        elif self._waiting_since_s is not None:
            self.waited_s += now_s - self._waiting_since_s
            self._waiting_since_s = None

    def idle_percent(self, num_rows: int) -> float | None:
        """Share of the device's time between the starts of full steps in which it had nothing to do; None
        where launches are synchronous."""
        if self.launches:
            last = self.launches[-1].end or self.launches[-1].begin  # it may not be sampled yet
            if last is not None:
                last.synchronize()
        idle_ms = total_ms = 0.0
        for earlier, later in itertools.pairwise(self.launches):
            if earlier.num_rows != num_rows or later.num_rows != num_rows:
                continue
            if earlier.begin is None or later.begin is None:
                return None
            idle_ms += earlier.idle_ms_before(later)
            total_ms += earlier.begin.elapsed_time(later.begin)
        return 100.0 * idle_ms / total_ms if total_ms else None

    def mark(self) -> torch.cuda.Event | None:
        if not self._cuda:
            return None
        start = time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's stubs
        event.record()
        self.marking_s += time.perf_counter() - start
        return event

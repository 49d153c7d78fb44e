"""The host's own time per step, without stopwatches inside: of turns of a real engine, less their waiting."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.host_step.stopwatch import Stopwatch
from phloem.shared.engine.engine_loop import Engine
from phloem.shared.engine.offline.driver import Driver

_WAITING, NOTING = "(the device works)", "(driver)"


class StepTimes(NamedTuple):
    """Microseconds of one step: the host's own, and all."""

    own_us: float
    all_us: float


class Turns:
    """Turns an engine that always has a step to launch; `watch` says by which clock."""

    def __init__(self, engine: Engine, driver: Driver, watch: Stopwatch) -> None:
        self._engine = engine
        self._watch = watch
        watch.around(engine, "_await_device", _WAITING)
        watch.around(driver, "note", NOTING)  # what the driver notes is not the engine's work

    def steps(self, count: int) -> list[StepTimes]:
        """A deadline may cut a turn's waiting short: the next turn is of the same step."""
        return [self._step() for _ in range(count)]

    def _step(self) -> StepTimes:
        engine, clock = self._engine, self._watch.clock
        launched, aside_s, start_s = engine._status.num_steps, self._aside_s(), clock()
        while engine._status.num_steps == launched:
            assert engine.turn(), "the batch has ended"
        all_s = clock() - start_s
        return StepTimes(1e6 * (all_s - (self._aside_s() - aside_s)), 1e6 * all_s)

    def _aside_s(self) -> float:
        return self._watch.total(_WAITING) + self._watch.total(NOTING)

"""How a run goes, while it goes: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from phloem.shared.bench.protocol import Tick
from phloem.shared.bench.ticks import EMPTY_TICK

_LINE_EVERY_S = 10.0


class LiveView(Protocol):
    """A `Watcher` that shows what it is told, between enter and exit."""

    def phase(self, text: str, num_requests: int) -> None: ...

    def tick(self, tick: Tick) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def live_view(console: Console) -> LiveView:
    """Bars when the console is a terminal, else lines."""
    return BarView(console) if console.is_terminal else LineView(console)


class _Rates:
    """Counts since the phase began, and tokens per second over the last tick."""

    def __init__(self) -> None:
        self._base = EMPTY_TICK
        self._last = EMPTY_TICK
        self._last_s = time.monotonic()

    def begin(self) -> None:
        self._base = self._last

    def done(self, tick: Tick) -> int:
        return tick.succeeded + tick.failed - self._base.succeeded - self._base.failed

    def describe(self, tick: Tick) -> str:
        now = time.monotonic()
        rate = (tick.tokens - self._last.tokens) / max(now - self._last_s, 1e-3)
        self._last, self._last_s = tick, now
        failed = tick.failed - self._base.failed
        parts = [f"{tick.in_flight} in flight", f"{rate:.0f} tok/s"]
        parts += [f"{failed} failed"] if failed else []
        parts += [f"own lag {tick.lag_ms:.0f} ms"] if tick.lag_ms >= 1 else []
        return ", ".join(parts)


class BarView:
    """One bar for the phase that runs."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[phase]}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, phase="")
        self._rates = _Rates()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, text: str, num_requests: int) -> None:
        self._rates.begin()
        self._progress.reset(self._task, total=num_requests or None, phase=text, description="")

    def tick(self, tick: Tick) -> None:
        done = self._rates.done(tick)
        self._progress.update(self._task, completed=done, description=self._rates.describe(tick))


class LineView:
    """A line for each phase, and one every ten seconds within it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rates = _Rates()
        self._shown_s = time.monotonic()
        self._phase = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def phase(self, text: str, num_requests: int) -> None:
        self._rates.begin()
        self._phase, self._shown_s = text, time.monotonic()
        self._print(f"{text}{f' ({num_requests} requests)' if num_requests else ''}")

    def tick(self, tick: Tick) -> None:
        done = self._rates.done(tick)
        text = self._rates.describe(tick)
        if time.monotonic() - self._shown_s >= _LINE_EVERY_S:
            self._shown_s = time.monotonic()
            self._print(f"{self._phase}: {done} done, {text}")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

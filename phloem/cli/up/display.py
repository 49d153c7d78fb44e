"""What the user sees while the cluster starts: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from phloem.cli.up.child_log import Stage

READY = "ready"
_ROW_WIDTH = 12


class Display(Protocol):
    """Shows one row per thing that is being made ready. Rows appear when they are first named."""

    def stage(self, row: str, stage: Stage) -> None: ...

    def ready(self, row: str, note: str = "") -> None: ...

    def line(self, text: str) -> None:
        """A message of its own, above the rows."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def display_for(console: Console) -> Display:
    """Bars when the console is a terminal, else lines."""
    return BarDisplay(console) if console.is_terminal else LineDisplay(console)


class BarDisplay:
    """A live row per thing, with a bar for the stage it is in."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.fields[row]}", table_column=Column(no_wrap=True, min_width=_ROW_WIDTH)),
            BarColumn(bar_width=24),
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            TimeElapsedColumn(),
            console=console,
        )
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, row: str, stage: Stage) -> None:
        total = stage.total or None
        self._progress.update(self._row(row), description=stage.stage, completed=stage.done, total=total)

    def ready(self, row: str, note: str = "") -> None:
        self._progress.update(self._row(row), description=note or READY, completed=1, total=1)

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _row(self, row: str) -> TaskID:
        if row not in self._rows:
            self._rows[row] = self._progress.add_task("starting", total=None, row=row)
        return self._rows[row]


class LineDisplay:
    """A line whenever a row enters a stage or is ready; counts within a stage are left out."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, str] = {}
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def stage(self, row: str, stage: Stage) -> None:
        self._show(row, stage.stage)

    def ready(self, row: str, note: str = "") -> None:
        self._show(row, note or READY)

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self, row: str, text: str) -> None:
        if self._shown.get(row) != text:
            self._shown[row] = text
            self.line(f"[{time.monotonic() - self._started:6.1f} s] {row}: {text}")

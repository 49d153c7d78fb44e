"""The log file of a child: its tail for a report, its start-up stages for the progress display."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import NamedTuple

_TAIL_BYTES = 16_384
_STAGE = re.compile(r'\bstage=(?:"(?P<quoted>[^"]+)"|(?P<plain>\S+)) done=(?P<done>\d+) total=(?P<total>\d+)')


class Stage(NamedTuple):
    """A step of a worker's start: `done` of `total`."""

    stage: str
    done: int
    total: int


def stage_in(line: str) -> Stage | None:
    """The stage that a log line reports, if it does."""
    found = _STAGE.search(line)
    if found is None:
        return None
    return Stage(found["quoted"] or found["plain"], int(found["done"]), int(found["total"]))


class ChildLog:
    """A file that a child appends to, over all its restarts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._rest = b""

    def new_lines(self) -> list[str]:
        """Complete lines since the last call; none while there is no file."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def tail(self, num_lines: int) -> list[str]:
        """The last lines, at most `num_lines` of them and 16 KiB. Progress is one line, how far it came:
        those of each percent would leave no room for the rest."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - _TAIL_BYTES))
                data = file.read()
        except FileNotFoundError:
            return []
        lines = data.decode(errors="replace").splitlines()
        told = [
            line
            for line, later in itertools.pairwise([*lines, ""])
            if stage_in(line) is None or stage_in(later) is None
        ]
        return told[-num_lines:]

"""What the tree stored and removed since somebody asked, as the cluster's index is told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class TreeEvents(NamedTuple):
    """Blocks by name; none is in both lists."""

    stored: list[bytes]
    removed: list[bytes]


class BlockChanges:
    """Net changes: a block that comes and goes again in between was never there."""

    def __init__(self) -> None:
        self._stored: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    def store(self, blocks: Iterable[bytes]) -> None:
        _note(blocks, self._stored, undoes=self._removed)

    def remove(self, blocks: Iterable[bytes]) -> None:
        _note(blocks, self._removed, undoes=self._stored)

    def take(self) -> TreeEvents:
        """The changes since the last call."""
        events = TreeEvents(list(self._stored), list(self._removed))
        self._stored.clear()
        self._removed.clear()
        return events


def _note(blocks: Iterable[bytes], changes: dict[bytes, None], *, undoes: dict[bytes, None]) -> None:
    for block in blocks:
        if block in undoes:
            del undoes[block]
        else:
            changes[block] = None

"""Changes of a radix tree that the index has not been told yet."""

from __future__ import annotations

from collections.abc import Iterable


class PendingChanges:
    """The net effect, per block, of what was stored and removed; the latest change of a block counts.

    More than `max_blocks` changes overflow: they are dropped, and `overflowed` says that only the whole tree
    (`replace`) can repair what the index knows.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._stored_by_block: dict[bytes, bool] = {}
        self.overflowed = False

    def __len__(self) -> int:
        return len(self._stored_by_block)

    def note(self, stored: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """Adds the changes of one step, removals first."""
        if self.overflowed:
            return
        changes = self._stored_by_block
        for block in removed:
            changes.pop(block, None)
            changes[block] = False
        for block in stored:
            changes.pop(block, None)
            changes[block] = True
        if len(changes) > self._max_blocks:
            self.overflowed = True
            changes.clear()

    def replace(self, blocks: Iterable[bytes]) -> None:
        """The tree holds exactly `blocks`, and the index knows none; they may be more than `max_blocks`."""
        self._stored_by_block = dict.fromkeys(blocks, True)
        self.overflowed = False

    def take(self, max_blocks: int) -> tuple[list[bytes], list[bytes]]:
        """Removes up to `max_blocks` changes, oldest first; returns (stored, removed)."""
        changes = self._stored_by_block
        batch = [block for _, block in zip(range(max_blocks), changes, strict=False)]
        stored = [block for block in batch if changes[block]]
        removed = [block for block in batch if not changes[block]]
        for block in batch:
            del changes[block]
        return stored, removed

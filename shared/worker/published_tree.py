"""What this worker's slot in the index holds, as far as the index has confirmed it."""

from __future__ import annotations

from collections.abc import Iterable

from phloem.shared.tree_digest import TreeDigest


class PublishedTree:
    """A set of blocks with its digest, from which samples are taken in turn until each block had its."""

    def __init__(self) -> None:
        self._blocks: set[bytes] = set()
        self._unsampled: list[bytes] = []
        self.digest = TreeDigest()

    def __len__(self) -> int:
        return len(self._blocks)

    def apply(self, stored: Iterable[bytes], removed: Iterable[bytes]) -> None:
        """Changes that the index confirmed; those that change nothing are allowed."""
        for block in removed:
            if block in self._blocks:
                self._blocks.remove(block)
                self.digest.remove(block)
        for block in stored:
            if block not in self._blocks:
                self._blocks.add(block)
                self.digest.add(block)

    def sample(self, max_blocks: int) -> list[bytes]:
        """Up to `max_blocks` blocks of the set."""
        if not self._unsampled:
            self._unsampled = list(self._blocks)
        batch, self._unsampled = self._unsampled[:max_blocks], self._unsampled[max_blocks:]
        return [block for block in batch if block in self._blocks]

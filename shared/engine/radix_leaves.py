"""The radix tree's leaves in the order in which they are evicted."""

from __future__ import annotations

import heapq

from phloem.shared.engine.radix_node import Node

_STALE_PER_LEAF = 8  # entries kept for each leaf before the stale ones are swept out


class EvictableLeaves:
    """A heap, least recently used first. An entry goes stale when its node is used, locked, extended or
    removed; it is dropped when it comes to the top."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Node]] = []
        self._pushes = 0  # breaks ties: nodes have no order

    def offer(self, node: Node, num_pages: int) -> None:
        """Notes a node if it could be evicted. `num_pages` of the tree, at least its number of leaves, bounds
        how many stale entries are kept."""
        if not node.is_evictable:
            return
        self._pushes += 1
        heapq.heappush(self._heap, (node.last_used, self._pushes, node))
        if len(self._heap) > 64 + _STALE_PER_LEAF * num_pages:
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapq.heapify(self._heap)

    def pop(self) -> Node | None:
        """The least recently used leaf; None when nothing can be evicted."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            if self._is_current(entry):
                return entry[2]
        return None

    @staticmethod
    def _is_current(entry: tuple[int, int, Node]) -> bool:
        used, _, node = entry
        return node.last_used == used and node.is_evictable

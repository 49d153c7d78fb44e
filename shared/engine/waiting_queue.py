"""Who waits for pages and a slot, in order of service."""

from __future__ import annotations

from collections import deque

from phloem.shared.engine.radix_tree import RadixTree
from phloem.shared.engine.requests import Request

MAX_LPM_QUEUE = 128  # a longer queue is served first come, first served: matching it all costs too much


class WaitingQueue:
    """Nothing of a waiting request is computed: `num_tokens` is all that they know."""

    def __init__(self) -> None:
        self._requests: deque[Request] = deque()
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._requests)

    def append(self, request: Request) -> None:
        self._requests.append(request)
        self.num_tokens += len(request.token_ids)

    def put_first(self, request: Request) -> None:
        """A request that was running before."""
        self._requests.appendleft(request)
        self.num_tokens += len(request.token_ids)

    def remove(self, request: Request) -> None:
        self._requests.remove(request)
        self.num_tokens -= len(request.token_ids)

    def in_order(self) -> list[Request]:
        return list(self._requests)

    def by_longest_prefix(self, tree: RadixTree) -> list[Request]:
        """Those first that find the most in the tree; in order when the queue is long."""
        waiting = list(self._requests)
        if len(waiting) <= MAX_LPM_QUEUE:
            waiting.sort(key=lambda r: -tree.num_matching_pages(r.token_ids, r.salt))
        return waiting

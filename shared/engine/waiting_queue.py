"""Who waits for pages and a slot, in order of service."""

from __future__ import annotations

from collections import deque

from phloem.shared.engine.radix_tree import RadixTree
from phloem.shared.engine.requests import Request

MAX_LPM_QUEUE = 128  # a longer queue is served first come, first served: matching it all costs too much


class WaitingQueue:
    """`num_tokens` are to be computed here for those that wait: what the tree held of a request when it came
    is not, nor what a peer computes for it."""

    def __init__(self, tree: RadixTree) -> None:
        self._tree = tree
        self._requests: deque[Request] = deque()
        self._num_tokens_of: dict[Request, int] = {}
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._requests)

    def append(self, request: Request) -> None:
        self._requests.append(request)
        self._count(request)

    def put_first(self, request: Request) -> None:
        """A request that was running before."""
        self._requests.appendleft(request)
        self._count(request)

    def remove(self, request: Request) -> None:
        self._requests.remove(request)
        self.num_tokens -= self._num_tokens_of.pop(request)

    def in_order(self) -> list[Request]:
        return list(self._requests)

    def by_longest_prefix(self) -> list[Request]:
        """Those first that find the most in the tree; in order when the queue is long."""
        waiting = list(self._requests)
        if len(waiting) <= MAX_LPM_QUEUE:
            waiting.sort(key=lambda r: -self._tree.num_matching_pages(r.token_ids, r.salt))
        return waiting

    def _count(self, request: Request) -> None:
        lacking = 0
        if request.phase != "decode":
            stored = self._tree.num_matching_pages(request.token_ids, request.salt) * self._tree.page_size
            lacking = max(1, len(request.token_ids) - stored)
        self._num_tokens_of[request] = lacking
        self.num_tokens += lacking

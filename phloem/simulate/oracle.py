"""What a cache could hit at best: one cache for the whole cluster, without queues, copies or delays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from phloem.simulate.workload import CONTENT_TOKENS, SimRequest


def lru_hit_rate(requests: Sequence[SimRequest], capacity_tokens: int | None) -> float:
    """The share of prompt tokens found in one LRU cache of this size (None: without end) over all requests
    in order of arrival.

    A prompt is in the cache, whole, as soon as it has arrived; its last token is computed in any case.
    """
    limit = None if capacity_tokens is None else capacity_tokens // CONTENT_TOKENS
    cache: OrderedDict[int, None] = OrderedDict()
    hits = total = 0
    for request in requests:
        found = 0
        for name in request.content:
            if name not in cache:
                break
            found += 1
        hits += min(found * CONTENT_TOKENS, request.num_tokens - 1)
        total += request.num_tokens
        for name in reversed(request.content):  # the end of a prefix is of less use than its beginning
            cache[name] = None
            cache.move_to_end(name)
        while limit is not None and len(cache) > limit:
            cache.popitem(last=False)
    return hits / total if total else 0.0

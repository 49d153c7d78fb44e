"""How much of its KV transfer a request's client can see."""

from __future__ import annotations

from collections import OrderedDict, deque

from phloem.shared.engine.kv_pool import OwnerKey

_MAX_OPEN = 4096
_MAX_LATEST = 1024
_WEIGHT = 0.2  # of the newest sample in the average


class Exposure:
    """On the prefill side's clock: from when token 0 was known here until word came that the decode side has
    admitted the request, which is one message later than it did."""

    def __init__(self) -> None:
        self._since_s: OrderedDict[OwnerKey, float] = OrderedDict()
        self._latest: deque[float] = deque(maxlen=_MAX_LATEST)
        self.average_s = 0.0  # moving; zero: none yet

    @property
    def latest_s(self) -> list[float]:
        """The last thousand or so, oldest first."""
        return list(self._latest)

    def handed_over(self, key: OwnerKey, token_made_at_s: float) -> None:
        self._since_s[key] = token_made_at_s
        if len(self._since_s) > _MAX_OPEN:  # their decode sides are gone
            self._since_s.popitem(last=False)

    def admitted(self, key: OwnerKey, now_s: float) -> None:
        since_s = self._since_s.pop(key, None)
        if since_s is None:
            return
        exposed_s = now_s - since_s
        self.average_s += (exposed_s - self.average_s) * (_WEIGHT if self._latest else 1.0)
        self._latest.append(exposed_s)

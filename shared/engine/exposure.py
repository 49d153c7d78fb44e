"""How much of its KV transfer a request's client can see, and when each part of a hand-over happened."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from dataclasses import dataclass

from phloem.shared.engine.kv_pool import OwnerKey

log = logging.getLogger(__name__)

_MAX_OPEN = 4096
_MAX_LATEST = 1024
_WEIGHT = 0.2  # of the newest sample in the average


@dataclass
class SendTimes:
    """Of one request at the prefill side, in seconds of the engine's clock; zero: not yet."""

    begun_s: float
    ready_s: float = 0.0  # the decode side has room
    launched_s: float = 0.0  # the first step that computes some of it
    first_piece_s: float = 0.0
    last_piece_s: float = 0.0
    made_s: float = 0.0  # token 0 was known
    last_s: float = 0.0  # nothing more was to be sent

    def line(self, admitted_s: float) -> str:
        """Milliseconds since the submission, but the exposed part: from token 0 on."""
        at = {
            "ready": self.ready_s,
            "launched": self.launched_s,
            "first piece": self.first_piece_s,
            "last piece": self.last_piece_s,
            "token": self.made_s,
            "last": self.last_s,
        }
        parts = [f"{name} {1e3 * (when - self.begun_s):.1f}" for name, when in at.items()]
        return f"{', '.join(parts)}; exposed {1e3 * (admitted_s - self.made_s):.1f} ms"


class Exposure:
    """On the prefill side's clock: from when token 0 was known here until word came that the decode side has
    admitted the request, which is one message later than it did."""

    def __init__(self) -> None:
        self._open: OrderedDict[OwnerKey, SendTimes] = OrderedDict()
        self._latest: deque[float] = deque(maxlen=_MAX_LATEST)
        self.average_s = 0.0  # moving; zero: none yet

    @property
    def latest_s(self) -> list[float]:
        """The last thousand or so, oldest first."""
        return list(self._latest)

    def handed_over(self, key: OwnerKey, times: SendTimes) -> None:
        self._open[key] = times
        if len(self._open) > _MAX_OPEN:  # their decode sides are gone
            self._open.popitem(last=False)

    def admitted(self, key: OwnerKey, at_s: float) -> None:
        times = self._open.pop(key, None)
        if times is None:
            return
        exposed_s = at_s - times.made_s
        self.average_s += (exposed_s - self.average_s) * (_WEIGHT if self._latest else 1.0)
        self._latest.append(exposed_s)
        log.debug("hand-over of %s: %s", key[0], times.line(at_s))

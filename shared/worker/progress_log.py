"""Progress of a start as log lines, which `phloem up` turns into a progress bar."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

INTERVAL_S = 0.5


class ProgressLog:
    """Logs `progress stage=... done=... total=...` at the start and the end of a stage, and in between at
    most once in `INTERVAL_S`: a model has a hundred weights, and its log other readers than a bar. Called
    from one thread at a time; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage = ""
        self._logged_at = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        if stage == self._stage and done < total and now - self._logged_at < INTERVAL_S:
            return
        self._stage, self._logged_at = stage, now
        log.info("progress", extra={"stage": stage, "done": done, "total": total})

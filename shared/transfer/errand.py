"""A call that may never return."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Errand:
    """Begins at once, on a thread of its own, which keeps no process from ending."""

    def __init__(self, body: Callable[[], None], name: str) -> None:
        self.failure = ""  # what it raised
        self._body: Callable[[], None] | None = body
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over, well or not."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def _run(self) -> None:
        body, self._body = self._body, None  # what it refers to goes when it is over
        assert body is not None
        try:
            body()
        except Exception as error:  # whoever waits is told
            log.info("%s: %s", self._thread.name, error)
            self.failure = str(error) or type(error).__name__

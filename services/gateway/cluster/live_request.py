"""A request under way: its state, and how its consumer waits for what workers send."""

from __future__ import annotations

import asyncio
import time

from phloem.services.gateway.cluster.request import RequestState
from phloem.services.gateway.generation import GenerationRequest
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import PeerRef


class LiveRequest:
    """The mailbox of one request. Session readers put events into `state` and `wake` it; they never wait for
    the consumer: tokens are merged, so a slow one holds no more than its own output.

    Made on the event loop, and closed at the end. Time limits are timers that wake it, so that waiting for a
    token sets none.
    """

    def __init__(self, request: GenerationRequest, sequence: int) -> None:
        self.state = RequestState(request)
        self.sequence = sequence
        self.avoid: set[PeerRef] = set()
        self.num_losses = 0  # attempts that failed because a worker did
        self.block_hashes: list[bytes] = []
        self.prefilling: tuple[PeerRef, int] | None = None  # who computes the prompt, and how many tokens
        self._started_at = time.monotonic()
        self._news = False
        self._sleeper: asyncio.Future[None] | None = None
        self._timed_out = False
        self._deadline = asyncio.get_running_loop().call_later(request.timeout_s, self._on_deadline)
        self._grace_over = False
        self._grace: asyncio.TimerHandle | None = None

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_at

    def wake(self) -> None:
        """Something in `state` may have changed."""
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(None)
        else:
            self._news = True

    def news(self, grace_s: float) -> asyncio.Future[None]:
        """To be awaited: done with the next `wake`, or with one that nobody awaited. `check_limits` after it:
        it may have been the deadline's, or that of a worker which was in grace for `grace_s` seconds.

        A future and not a coroutine: this is awaited for every token."""
        if self.state.in_grace or self._grace is not None:
            self._watch_grace(grace_s)
        self._sleeper = asyncio.get_running_loop().create_future()
        if self._news:
            self._sleeper.set_result(None)
        self._news = False
        return self._sleeper

    def check_limits(self) -> bool:
        """Whether a worker in grace has used up its time; then the attempt has failed.

        Raises `PhloemError` (`request_timeout`) past the request's own deadline.
        """
        if self._timed_out:
            raise request_timeout(self.state.request.timeout_s)
        if self._grace_over and self.state.in_grace:
            self.state.on_grace_over()
            self._end_grace()
            return True
        return False

    def close(self) -> None:
        """Stops the timers."""
        self._deadline.cancel()
        self._end_grace()

    def _watch_grace(self, grace_s: float) -> None:
        """Grace is counted from when it was first seen until it ends."""
        if not self.state.in_grace:
            self._end_grace()
        elif self._grace is None:
            self._grace = asyncio.get_running_loop().call_later(grace_s, self._on_grace_over)

    def _end_grace(self) -> None:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None
        self._grace_over = False

    def _on_deadline(self) -> None:
        self._timed_out = True
        self.wake()

    def _on_grace_over(self) -> None:
        self._grace_over = True
        self.wake()


def request_timeout(timeout_s: float) -> PhloemError:
    return PhloemError(
        "request_timeout",
        f"the request did not finish within {timeout_s:g} s",
        retryable=True,
        http_status=504,
    )

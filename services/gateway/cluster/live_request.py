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
    the consumer: tokens are merged, so a slow one holds no more than its own output."""

    def __init__(self, request: GenerationRequest, sequence: int) -> None:
        self.state = RequestState(request)
        self.sequence = sequence
        self.avoid: set[PeerRef] = set()
        self.num_losses = 0  # attempts that failed because a worker did
        self.block_hashes: list[bytes] = []
        self.prefilling: tuple[PeerRef, int] | None = None  # who computes the prompt, and how many tokens
        self._started_at = time.monotonic()
        self._grace_ends_at: float | None = None
        self._changed = asyncio.Event()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_at

    def wake(self) -> None:
        """Something in `state` may have changed."""
        self._changed.set()

    async def wait(self, grace_s: float) -> bool:
        """Returns False after the next `wake`, True when a worker in grace has used up its `grace_s` seconds
        (then the attempt has failed).

        Raises `PhloemError` (`request_timeout`) past the request's own deadline.
        """
        deadline = self._started_at + self.state.request.timeout_s
        if self.state.in_grace:
            self._grace_ends_at = self._grace_ends_at or time.monotonic() + grace_s
        else:
            self._grace_ends_at = None
        try:
            await self._wait_until(min(deadline, self._grace_ends_at or deadline))
        except TimeoutError:
            if time.monotonic() >= deadline:
                raise request_timeout(self.state.request.timeout_s) from None
            self.state.on_grace_over()
            return True
        return False

    async def _wait_until(self, moment: float) -> None:
        async with asyncio.timeout(max(0.0, moment - time.monotonic())):
            await self._changed.wait()
        self._changed.clear()


def request_timeout(timeout_s: float) -> PhloemError:
    return PhloemError(
        "request_timeout",
        f"the request did not finish within {timeout_s:g} s",
        retryable=True,
        http_status=504,
    )

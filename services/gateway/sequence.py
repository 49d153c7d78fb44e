"""One sequence under way: tokens in, text out, until an end token, a stop string or a length."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeAlias

from msgspec import Struct

from phloem.services.gateway.generation import GeneratedTokens, GenerationRequest, Generator
from phloem.services.gateway.metrics import GatewayMetrics
from phloem.services.gateway.text.detokenizer import Detokenizer
from phloem.services.gateway.text.stop import StopMatcher
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import FinishReason


class TextDelta(Struct, frozen=True):
    """What one arrival of tokens added. `text` may be empty; the last delta has a `finish_reason`."""

    text: str
    finish_reason: FinishReason | None = None


OnDelta: TypeAlias = "Callable[[RunningSequence, TextDelta], Awaitable[None]]"


class RunningSequence:
    """One choice of one prompt. Make it, then `run` it once; the counts grow while it runs."""

    def __init__(
        self,
        request: GenerationRequest,
        *,
        index: int,
        prompt_index: int,
        stops: Sequence[str],
        detokenizer: Detokenizer,
        received_at: float,
    ) -> None:
        """`index` numbers it among the choices of the response; `received_at` is on the monotonic clock."""
        self.request = request
        self.index = index
        self.prompt_index = prompt_index
        self.token_ids: list[int] = []
        self.num_cached_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.timeline: dict[str, float] = {}
        self._pieces: list[str] = []
        self._stop = StopMatcher(stops)
        self._is_plain = not stops
        self._detokenizer = detokenizer
        self._received_at = received_at
        self._submitted_s = 0.0
        self._last_arrival_s: float | None = None

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._pieces)

    @property
    def num_generated_tokens(self) -> int:
        """Up to and with the token that completed a stop string."""
        return len(self.token_ids)

    @property
    def matched_stop(self) -> str | int | None:
        """The stop string, or the end or stop token, that ended it."""
        if self._stop.matched is not None:
            return self._stop.matched
        return self.token_ids[-1] if self.finish_reason == "stop" and self.token_ids else None

    async def run(
        self,
        generator: Generator,
        metrics: GatewayMetrics,
        on_delta: OnDelta,
    ) -> None:
        """Generates, waiting for `on_delta` before more is taken. A stop string aborts on the workers before
        its delta is told; so does a cancellation.

        Raises `PhloemError`.
        """
        self._submitted_s = self._mark("submitted")
        try:
            last = ""
            async with aclosing(generator.generate(self.request)) as arrivals:
                async for arrival in arrivals:
                    self._note(arrival, metrics)
                    text = self._text_of(arrival)
                    self._pieces.append(text)
                    if self.finish_reason is not None:
                        last = text
                        break
                    await on_delta(self, TextDelta(text))
            if self.finish_reason is None:
                raise PhloemError(
                    "generation_incomplete", "the cluster ended the generation without a reason"
                )
            self._mark("finished")
            await on_delta(self, TextDelta(last, self.finish_reason))
        finally:
            metrics.sequence_ended(
                seconds=self._since_arrival(),
                num_prompt_tokens=len(self.request.token_ids),
                num_cached_tokens=self.num_cached_tokens,
                num_generated_tokens=self.num_generated_tokens,
            )

    def _text_of(self, arrival: GeneratedTokens) -> str:
        """The text that the arrival adds, and the finish reason when it ends the sequence."""
        if arrival.finish_reason == "abort":
            raise PhloemError("aborted", "the generation was aborted", retryable=True, http_status=503)
        if arrival.finish_reason is None and self._is_plain:
            self.token_ids += arrival.token_ids
            return self._detokenizer.push(*arrival.token_ids)
        # The engine knows no stop strings: with "stop" its last token is an end or stop token, not text.
        hidden_at = len(arrival.token_ids) - 1 if arrival.finish_reason == "stop" else None
        pieces = []
        for position, token_id in enumerate(arrival.token_ids):
            self.token_ids.append(token_id)
            if position != hidden_at:
                pieces.append(self._stop.push(self._detokenizer.push(token_id)))
            if self._stop.matched is not None:
                self.finish_reason = "stop"
                return "".join(pieces)
        if arrival.finish_reason is not None:
            pieces.append(self._last_text())
            self.finish_reason = "stop" if self._stop.matched is not None else arrival.finish_reason
        return "".join(pieces)

    def _last_text(self) -> str:
        text = self._stop.push(self._detokenizer.flush())
        return text if self._stop.matched is not None else text + self._stop.flush()

    def _note(self, arrival: GeneratedTokens, metrics: GatewayMetrics) -> None:
        self.num_cached_tokens = arrival.num_cached_tokens or self.num_cached_tokens
        if arrival.timeline:
            for event, seconds in arrival.timeline.items():
                self.timeline[event] = self._submitted_s + seconds
        if not arrival.token_ids:
            return
        now_s = time.monotonic() - self._received_at
        if self._last_arrival_s is None:
            self.timeline["gateway_first_token"] = now_s
            metrics.first_token(now_s)
        else:
            metrics.tokens_followed(len(arrival.token_ids), now_s - self._last_arrival_s)
        self._last_arrival_s = now_s

    def _mark(self, event: str) -> float:
        now_s = self.timeline[f"gateway_{event}"] = self._since_arrival()
        return now_s

    def _since_arrival(self) -> float:
        return time.monotonic() - self._received_at

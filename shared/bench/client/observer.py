"""Turns the events of one response into a record."""

from __future__ import annotations

from array import array

import msgspec

from phloem.shared.bench.client.dialect import Event, reader_for
from phloem.shared.bench.client.sse import EventSplitter
from phloem.shared.bench.protocol import ApiName

_DONE = b"[DONE]"


class TokenTally:
    """Tokens as they come, over all requests: for the progress line."""

    def __init__(self) -> None:
        self.tokens = 0


class StreamObserver:
    """The sink of one response's body: stamps chunks, counts tokens, keeps what the next turn needs.

    A chunk is an event that carries output: text, a tool call, or a token count that grew (a token whose
    text is held back, as half a character is). A chunk's tokens are known when the server sends cumulative
    counts with its events; otherwise `chunk_tokens` stays empty.
    """

    __slots__ = (
        "_are_tokens_known",
        "_decoder",
        "_keep_pieces",
        "_splitter",
        "_tally",
        "cached_tokens",
        "error",
        "finish_reason",
        "has_ended",
        "last_event_s",
        "output_tokens",
        "pieces",
        "prompt_tokens",
        "stamps",
        "token_counts",
        "token_ids",
    )

    def __init__(self, api: ApiName, tally: TokenTally, *, keep_pieces: bool) -> None:
        self._tally = tally
        self._keep_pieces = keep_pieces
        self._splitter = EventSplitter()
        self._decoder = reader_for(api)
        self._are_tokens_known = True
        self.stamps = array("d")
        self.token_counts = array("I")
        self.pieces: list[str] = []
        self.token_ids: list[int] = []
        self.output_tokens = self.prompt_tokens = self.cached_tokens = -1
        self.finish_reason = ""
        self.error = ""
        self.has_ended = False
        self.last_event_s = 0.0

    def body(self, data: bytes, at_s: float) -> None:
        for event in self._splitter.feed(data):
            self.last_event_s = at_s
            if event == _DONE:
                self.has_ended = True
                continue
            try:
                self._take(self._decoder.read(event), at_s)
            except msgspec.DecodeError as error:
                self.error = f"an event can't be read: {error}"

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def chunk_tokens(self) -> bytes:
        """Tokens of each chunk (uint32), or nothing when the server did not say, chunk by chunk."""
        return self.token_counts.tobytes() if self._are_tokens_known else b""

    def problem(self) -> str:
        """Why the response is no success; "" when it is one."""
        if self.error:
            return self.error
        if not self.has_ended and not self.finish_reason:
            return "the stream ended without a finish reason and without [DONE]"
        if not self.stamps:
            return "no tokens came"
        return ""

    def _take(self, event: Event, at_s: float) -> None:
        if event.error:
            self.error = event.error
        if event.finish_reason:
            self.finish_reason = event.finish_reason
        if event.prompt_tokens >= 0:
            self.prompt_tokens = event.prompt_tokens
        if event.cached_tokens >= 0:
            self.cached_tokens = event.cached_tokens
        if event.token_ids:
            self.token_ids.extend(event.token_ids)
        num_new = event.output_tokens - max(self.output_tokens, 0)
        self.output_tokens = max(self.output_tokens, event.output_tokens)
        if event.has_tokens and event.output_tokens < 0:
            self._are_tokens_known = False
            self._chunk(0, at_s, event.text)
        elif num_new > 0 and (event.has_tokens or not self._is_closing()):
            self._chunk(num_new, at_s, event.text)
        elif event.text and self.pieces:
            self.pieces[-1] += event.text  # text that an earlier token had held back

    def _is_closing(self) -> bool:
        """Whether a count without output is no chunk: an end token, or the sum of all chunks."""
        return bool(self.stamps) and (bool(self.finish_reason) or not self._are_tokens_known)

    def _chunk(self, num_tokens: int, at_s: float, text: str) -> None:
        self.stamps.append(at_s)
        self.token_counts.append(num_tokens)
        self._tally.tokens += num_tokens or 1
        if self._keep_pieces:
            self.pieces.append(text)

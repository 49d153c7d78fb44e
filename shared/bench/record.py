"""What was seen of one request. Times are of the machine's monotonic clock, in seconds."""

from __future__ import annotations

from array import array

import msgspec


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request as the client saw it; `error` is "" when it succeeded.

    `sent_s` is when the client began to send (opening a connection counts, as in SGLang's bench_serving);
    `scheduled_s` is when the load said it should. `chunk_offsets` (float64) are seconds from `sent_s` to
    each chunk that carried tokens, `chunk_tokens` (uint32) the tokens in it, empty when the server doesn't
    tell. `ended_s` is the arrival of the last event. Token counts are the server's `usage`; negative: it
    sent none. `pieces` are the chunks' texts, kept only on request.
    """

    target: int
    block: int
    session: int
    turn: int
    sent_s: float
    ended_s: float
    scheduled_s: float
    max_tokens: int
    expected_prompt_tokens: int = 0
    prompt_tokens: int = -1
    output_tokens: int = -1
    cached_tokens: int = -1
    chunk_offsets: bytes = b""
    chunk_tokens: bytes = b""
    finish_reason: str = ""
    status: int = 0
    error: str = ""
    connect_s: float = 0.0
    resent: bool = False  # a kept-alive connection was closed under the first try, before any answer
    is_warmup: bool = False
    pieces: list[str] = []

    @property
    def succeeded(self) -> bool:
        return not self.error

    @property
    def ttft_s(self) -> float:
        """Seconds to the first chunk with a token; only of a request that succeeded."""
        return self.offsets()[0]

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.sent_s

    def offsets(self) -> array[float]:
        return array("d", self.chunk_offsets)

    def tokens(self) -> array[int]:
        """Tokens of each chunk; empty when they aren't known."""
        return array("I", self.chunk_tokens)

"""What became of each request."""

from __future__ import annotations

import msgspec


class Outcome(msgspec.Struct, kw_only=True):
    """Times in seconds on the simulated clock, as the gateway sees them; lengths in tokens.

    `cached_tokens` were found in the tree of the worker that computed the prompt. `num_ends` counts terminal
    events: one, whatever happened.
    """

    index: int
    arrival_s: float
    num_tokens: int
    num_output_tokens: int
    first_token_s: float = -1.0
    finished_s: float = -1.0
    cached_tokens: int = 0
    num_attempts: int = 0
    num_ends: int = 0
    is_local: bool = False

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first; zero for a single token."""
        return (self.finished_s - self.first_token_s) / max(1, self.num_output_tokens - 1)

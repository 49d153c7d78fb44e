"""What bounds a step and the queue; fixed at start."""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """max_step_tokens: of one step. max_mixed_tokens: prompt tokens of a step that decodes too; 0: only
    `max_step_tokens` counts. max_slots: requests that run. max_queued: requests that wait."""

    max_step_tokens: int
    max_slots: int
    max_queued: int
    longest_prefix_first: bool = False
    max_mixed_tokens: int = 0

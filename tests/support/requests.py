"""Requests as a runner sees them: with a slot and pages, without a scheduler."""

from __future__ import annotations

from phloem.shared.engine.requests import Request
from phloem.shared.protocol.session import SamplingParams, Submit
from tests.support.tiny_model import random_prompt


def make_request(slot: int, page_ids: list[int], sampling: SamplingParams, length: int = 3) -> Request:
    """One with a random prompt of `length` tokens."""
    prompt = random_prompt(length, slot)
    submit = Submit(
        request_id=f"slot {slot}",
        attempt=1,
        epoch=1,
        phase="both",
        token_ids=prompt,
        num_prompt_tokens=length,
        sampling=sampling,
    )
    request = Request(submit, gateway=0, order=0, eos_token_ids=(), context_length=200, now_s=0.0)
    request.slot, request.page_ids = slot, page_ids
    return request

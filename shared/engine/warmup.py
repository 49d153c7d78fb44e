"""Runs the model once on made-up requests, so that no user pays for first-time costs."""

from __future__ import annotations

from phloem.shared.engine.requests import Request
from phloem.shared.engine.step_plan import Row, StepPlan
from phloem.shared.engine.step_runner import StepRunner
from phloem.shared.protocol.session import SamplingParams, Submit


def warm_up(runner: StepRunner, tokens: int, page_size: int, rows: int = 0) -> None:
    """A chunk of `tokens` tokens and one decode row, greedy and sampled, then `rows` decode rows that use
    every filter; pages [0, ...) are written, `rows` of them at least.

    What it leaves there is never read: a page is written before a request reads it.
    """
    for temperature in (0.0, 1.0):
        request = _request(tokens, SamplingParams(max_tokens=1, temperature=temperature))
        request.page_ids = list(range(-(-tokens // page_size)))
        for start, count in ((0, tokens), (tokens - 1, 1)):
            runner.launch(StepPlan([Row(request, start, count, True, False)])).token_ids()
    if rows:
        many = [_in_slot(slot) for slot in range(rows)]
        runner.launch(StepPlan([Row(request, 0, 1, True, False) for request in many])).token_ids()


def _in_slot(slot: int) -> Request:
    request = _request(1, SamplingParams(max_tokens=1, temperature=1.0, top_k=50, top_p=0.9, min_p=0.01))
    request.slot, request.page_ids = slot, [slot]
    return request


def _request(tokens: int, sampling: SamplingParams) -> Request:
    submit = Submit(
        request_id="warmup",
        attempt=0,
        epoch=0,
        phase="both",
        token_ids=[0] * tokens,
        num_prompt_tokens=tokens,
        sampling=sampling,
    )
    request = Request(submit, gateway=0, order=0, eos_token_ids=(), context_length=tokens + 1, now_s=0.0)
    request.slot = 0
    return request

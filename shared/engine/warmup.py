"""Runs the model once on made-up requests, so that no user pays for first-time costs."""

from __future__ import annotations

import torch

from phloem.shared.engine.grammar.masks import TokenMasks
from phloem.shared.engine.requests import Request
from phloem.shared.engine.step_plan import Row, StepPlan
from phloem.shared.engine.step_runner import StepRunner
from phloem.shared.protocol.session import Grammar, SamplingParams, Submit


def warm_up(runner: StepRunner, tokens: int, page_size: int) -> None:
    """A chunk of `tokens` tokens and one decode row, greedy and sampled; pages [0, ...) are written.

    What it leaves there is never read: a page is written before a request reads it.
    """
    for temperature in (0.0, 1.0):
        request = _request(tokens, SamplingParams(max_tokens=1, temperature=temperature))
        request.page_ids = list(range(-(-tokens // page_size)))
        for start, count in ((0, tokens), (tokens - 1, 1)):
            runner.launch(StepPlan([Row(request, start, count, True, False)])).token_ids()


def warm_up_filters(runner: StepRunner, rows: int, vocab_size: int) -> None:
    """`rows` decode rows that use every filter, the first one with a grammar's mask; as many pages are
    written."""
    grammar = Grammar("json_object")
    many = [_in_slot(slot, grammar if slot == 0 else None) for slot in range(rows)]
    step = runner.launch(StepPlan([Row(request, 0, 1, True, False) for request in many]))
    everything = torch.full((1, -(-vocab_size // 32)), -1, dtype=torch.int32)
    step.sample(TokenMasks(torch.zeros(1, dtype=torch.int64), everything))
    step.token_ids()


def _in_slot(slot: int, grammar: Grammar | None) -> Request:
    filters = SamplingParams(max_tokens=1, temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, grammar=grammar)
    request = _request(1, filters)
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

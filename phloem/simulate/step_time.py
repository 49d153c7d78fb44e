"""How long a planned step takes on the modelled device."""

from __future__ import annotations

from typing import NamedTuple

from phloem.shared.engine.step_plan import StepPlan
from phloem.simulate.options import StepModel


class StepTime(NamedTuple):
    """`prompt_s`: from the step's start until the tokens of its prompt chunks are sampled; `total_s`: until
    the step ends."""

    prompt_s: float
    total_s: float


def prefill_s(model: StepModel, start: int, num_tokens: int) -> float:
    """A chunk of tokens [start, start + num_tokens) alone."""
    return model.prefill_fixed_s + _chunk_s(model, start, num_tokens)


def decode_s(model: StepModel, batch: int, context_tokens: int) -> float:
    """One token for each of `batch` sequences that hold `context_tokens` in all."""
    kv_bytes = context_tokens * model.kv_bytes_per_token
    return model.decode_fixed_s + batch * model.decode_sequence_s + kv_bytes / model.kv_read_bytes_per_s


def step_time(model: StepModel, plan: StepPlan, grain: int) -> StepTime:
    """A row that decodes makes a unit, so `grain` steps; the first of them shares the pass over the weights
    with the step's prompt chunks, if it has any."""
    chunks_s = 0.0
    batch = context = 0
    has_chunk = False
    for row in plan.rows:
        if row.start < row.request.num_prompt_tokens or row.num_tokens > 1:
            has_chunk = True
            chunks_s += _chunk_s(model, row.start * grain, row.num_tokens * grain)
        else:
            batch += 1
            context += row.start * grain
    step_s = decode_s(model, batch, context) if batch else 0.0
    if not has_chunk:
        return StepTime(grain * step_s, grain * step_s)
    prompt_s = model.prefill_fixed_s + chunks_s
    if not batch:
        return StepTime(prompt_s, prompt_s)
    first_s = prompt_s + step_s - model.decode_fixed_s
    return StepTime(first_s, first_s + (grain - 1) * step_s)


def _chunk_s(model: StepModel, start: int, num_tokens: int) -> float:
    pairs = num_tokens * (start + num_tokens / 2)
    return num_tokens * model.prefill_token_s + pairs * model.prefill_pair_s

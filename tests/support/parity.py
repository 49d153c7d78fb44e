"""Greedy tokens beside a reference whose own choices are known with their logits.

The reference is transformers in float32. An engine in bfloat16 may choose another token only where the two
are tied within bfloat16's error: no further apart in the reference than transformers' own bfloat16 moves
such gaps. After a difference the engine goes on from the reference's tokens, so that every one of them is
compared, whatever came before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import torch

from phloem.shared.protocol.session import SamplingParams
from tests.support.reference import MAX_TOKENS, Reference, encode_prompts
from tests.support.streams import Stream

CANDIDATES = 5
REFERENCE_FILE = "reference.json"
FLOAT32_TIE = 1e-3  # sums in another order


class GreedyEngine(Protocol):
    """What is compared: `BuiltEngine`."""

    def submit(
        self, request_id: str, token_ids: list[int], num_prompt_tokens: int, sampling: SamplingParams
    ) -> None: ...

    def run(self) -> Mapping[str, Stream]: ...


class Step(msgspec.Struct, frozen=True):
    """One token of the reference: its best candidates, best first, and their float32 logits."""

    token_ids: tuple[int, ...]
    logits: tuple[float, ...]

    def gap(self, token: int) -> float:
        """By how much the reference prefers its own choice; infinite for what is no candidate."""
        for candidate, logit in zip(self.token_ids, self.logits, strict=True):
            if candidate == token:
                return self.logits[0] - logit
        return float("inf")


class Case(msgspec.Struct, frozen=True):
    prompt: list[int]
    steps: list[Step]

    @property
    def token_ids(self) -> list[int]:
        return [step.token_ids[0] for step in self.steps]


class ParityReference(msgspec.Struct, frozen=True):
    """`bfloat16_error`: the most by which transformers in bfloat16, on the same tokens, moves the gap between
    two of a step's candidates."""

    cases: list[Case]
    bfloat16_error: float


class Difference(NamedTuple):
    """Where the engine chose another token than the reference, and how far apart these are there."""

    prompt: int
    at: int
    expected: int
    found: int
    gap: float


def read_reference(path: Path) -> ParityReference:
    return msgspec.json.decode(path.read_bytes(), type=ParityReference)


def make_reference(model_dir: Path) -> ParityReference:
    """Of the 20 prompts of `tests/support/reference.py`; takes minutes on two cores."""
    prompts = encode_prompts(model_dir)
    exact, rounded = Reference(model_dir), Reference(model_dir, torch.bfloat16)
    cases, error = [], 0.0
    for prompt in prompts:
        tokens = exact.greedy([prompt])[0].token_ids
        logits, ids = exact.forced_logits(prompt, tokens).topk(CANDIDATES)
        assert ids[:, 0].tolist() == tokens, (
            "a pass over all tokens disagrees with the loop: a tie in float32"
        )
        low = rounded.forced_logits(prompt, tokens).gather(1, ids)
        error = max(error, float(((low[:, :1] - low) - (logits[:, :1] - logits)).abs().max()))
        steps = [
            Step(tuple(row), tuple(values)) for row, values in zip(ids.tolist(), logits.tolist(), strict=True)
        ]
        cases.append(Case(prompt, steps))
    return ParityReference(cases, error)


def find_differences(engine: GreedyEngine, reference: ParityReference) -> list[Difference]:
    """All prompts in one batch; those that differ go on after it, until every token is compared."""
    differences: list[Difference] = []
    todo = {index: 0 for index in range(len(reference.cases))}
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    while todo:
        for index, start in todo.items():
            case = reference.cases[index]
            engine.submit(f"{index}", case.prompt + case.token_ids[:start], len(case.prompt), sampling)
        streams = engine.run()
        found = {index: streams[f"{index}"].token_ids for index in todo}
        new = [
            difference
            for index, start in todo.items()
            if (difference := _first_difference(index, reference.cases[index], start, found[index]))
        ]
        differences += new
        todo = {difference.prompt: difference.at + 1 for difference in new if difference.at + 1 < MAX_TOKENS}
    return differences


def table(differences: Sequence[Difference], tolerance: float) -> str:
    """A line for each difference, the largest gap first."""
    head = (
        f"{'prompt':>8s}{'token':>7s}{'expected':>10s}{'found':>8s}{'gap in logits':>15s}{'tolerance':>11s}"
    )
    lines = [
        f"{one.prompt:8d}{one.at:7d}{one.expected:10d}{one.found:8d}{one.gap:15.4f}{tolerance:11.4f}"
        f"  {'tie' if one.gap <= tolerance else 'WRONG'}"
        for one in sorted(differences, key=lambda one: -one.gap)
    ]
    return "\n".join([head, *lines]) if lines else "no token differs"


def _first_difference(prompt: int, case: Case, start: int, found: list[int]) -> Difference | None:
    assert len(found) == len(case.steps) - start, f"{len(found)} tokens instead of {len(case.steps) - start}"
    for at, token in enumerate(found, start):
        if token != case.token_ids[at]:
            return Difference(prompt, at, case.token_ids[at], token, case.steps[at].gap(token))
    return None

"""What `phloem bench offline` measures, and how its requests are chosen and sized."""

from __future__ import annotations

from typing import cast

import pytest

from phloem.shared.engine.engine_loop import Engine
from phloem.shared.engine.offline.driver import Driver
from phloem.shared.engine.offline.work import GREEDY, SAMPLED, DecodePlan, OfflineWork, StepSampling
from phloem.shared.protocol.engine import EngineSubmit


class Recorder:
    """Takes what a driver submits, as an engine would."""

    def __init__(self) -> None:
        self.submits: list[EngineSubmit] = []

    def deliver(self, message: object) -> None:
        if isinstance(message, EngineSubmit):
            self.submits.append(message)


def sampled(*decode: tuple[int, int], grammar_share: float = 0.0) -> OfflineWork:
    return OfflineWork(prefill=(), decode=decode, sampled=True, grammar_share=grammar_share)


def test_plain_steps_are_of_every_shape_and_as_sampling_says() -> None:
    hot = StepSampling(temperature=1.0, top_k=40)
    runs = list(OfflineWork(prefill=(), decode=((1, 64), (8, 32)), steps=12, sampling=hot).decode_runs)
    assert [(run.kind, run.batch, run.context) for run in runs] == [("decode", 1, 64), ("decode", 8, 32)]
    assert all(run.sampling == hot and run.num_steps == 12 and not run.grammar_share for run in runs)


def test_sampled_adds_one_row_at_the_largest_shape_of_batch_64() -> None:
    runs = list(sampled((64, 1024), (64, 2048), (256, 4096), (1, 8192)).decode_runs)
    assert [(run.kind, run.batch, run.context) for run in runs] == [
        ("decode", 64, 1024),
        ("decode", 64, 2048),
        ("decode, sampled", 64, 2048),
        ("decode", 256, 4096),
        ("decode", 1, 8192),
    ]
    assert [run.sampling for run in runs] == [GREEDY, GREEDY, SAMPLED, GREEDY, GREEDY]


def test_grammars_and_sampling_are_rows_of_their_own() -> None:
    runs = list(sampled((64, 32), (8, 32), grammar_share=0.5).decode_runs)
    assert [(run.kind, run.batch, run.grammar_share, run.sampling) for run in runs] == [
        ("decode", 64, 0.0, GREEDY),
        ("decode, grammars", 64, 0.5, GREEDY),
        ("decode, sampled", 64, 0.0, SAMPLED),
        ("decode", 8, 0.0, GREEDY),
        ("decode, grammars", 8, 0.5, GREEDY),
    ]


def test_sampled_without_a_batch_of_64_is_refused() -> None:
    with pytest.raises(ValueError, match="--sampled measures a batch of 64"):
        sampled((63, 1024))


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_filters_of_greedy_steps_are_refused(filters: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="do nothing at --temperature 0"):
        StepSampling(**filters)  # type: ignore[arg-type]  # a float and an int
    assert StepSampling(temperature=0.5, **filters).temperature == 0.5  # type: ignore[arg-type]


def test_the_filters_and_a_seed_of_its_own_reach_every_request() -> None:
    engine, driver = Recorder(), Driver(300)
    driver.attach(cast(Engine, engine))
    sampling = StepSampling(temperature=0.8, top_p=0.9, top_k=40, min_p=0.05)
    driver.start_batch(5, 20, 7, sampling=sampling, staggered=True, grammar_share=0.4)
    params = [submit.submit.sampling for submit in engine.submits]
    assert {(p.temperature, p.top_p, p.top_k, p.min_p) for p in params} == {(0.8, 0.9, 40, 0.05)}
    assert len({p.seed for p in params}) == 5
    assert all(p.max_tokens == 7 and p.ignore_eos for p in params)
    assert sum(p.grammar is not None for p in params) == 2


def test_a_plans_prompts_are_those_that_the_driver_submits() -> None:
    engine, driver = Recorder(), Driver(300)
    driver.attach(cast(Engine, engine))
    plan = DecodePlan(40, 100, 16, chunk_tokens=2048)
    driver.start_batch(plan.batch, plan.prompt_tokens, plan.new_tokens, staggered=True)
    assert [submit.submit.num_prompt_tokens for submit in engine.submits] == plan.prompts
    assert len(set(plan.prompts)) == 17
    assert plan.longest == max(plan.prompts) + plan.new_tokens


@pytest.mark.parametrize(("chunk_tokens", "lead"), [(8192, 24), (4096, 24), (2048, 40), (512, 136)])
def test_a_batch_gathers_over_more_steps_of_fewer_tokens(chunk_tokens: int, lead: int) -> None:
    plan = DecodePlan(64, 1024, 64, chunk_tokens)
    assert plan.lead == lead
    assert plan.prompt_tokens + plan.lead + plan.num_steps // 2 == 1024, "the context is in the middle"
    assert plan.new_tokens == lead + 64

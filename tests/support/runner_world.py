"""An engine of which only the steps are real: requests come and go over a runner of the test's."""

from __future__ import annotations

import random
from typing import NamedTuple

from phloem.shared.engine.step_plan import StepPlan
from phloem.shared.engine.step_runner import LaunchedStep, LayerWatch, StepRunner
from phloem.shared.protocol.engine import EngineSubmit
from phloem.shared.protocol.session import SamplingParams, Submit
from tests.support.engine_world import EngineWorld, FakeDevice
from tests.support.streams import Stream
from tests.support.tiny_model import random_prompt

PAGE, SLOTS, MAX_PAGES = 4, 6, 50


class RunnerDevice(FakeDevice):
    """The steps of a real runner; no KV ever leaves."""

    def __init__(self, runner: StepRunner, num_pages: int) -> None:
        super().__init__(num_pages, PAGE, SLOTS, runs_ahead=True)
        self._runner = runner
        self.num_captured = 0

    def launch(self, plan: StepPlan, watch: LayerWatch | None = None) -> LaunchedStep:  # type: ignore[override]
        self.num_launched += 1
        self.num_collected += 1
        self.num_captured += plan.decode is not None
        return self._runner.launch(plan, watch)


class Answers(NamedTuple):
    """By request: what was submitted, and the tokens. num_retractions: how often one had to start again."""

    submits: dict[str, Submit]
    tokens: dict[str, list[int]]
    num_retractions: int


def sampling_of(index: int, max_tokens: int) -> SamplingParams:
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 7 * index},
        {"temperature": 1.2, "seed": index, "top_k": 9, "top_p": 0.9},
    ]
    # Requests with filters are few and late: most steps are without.
    kind = kinds[2] if index in (8, 13) else kinds[index % 2]
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **kind)  # type: ignore[arg-type]


def answers_of(device: FakeDevice, num_pages: int) -> Answers:
    """Fourteen requests come and go, greedy, with a temperature, and a few with filters."""
    submits = {}
    rng = random.Random(3)
    world = EngineWorld(device=device, num_pages=num_pages, page_size=PAGE, slots=SLOTS, budget=64)
    for index in range(14):
        prompt = random_prompt(rng.randint(1, 30), index)
        world.streams[f"r{index}"] = Stream(0)
        submit = submits[f"r{index}"] = Submit(
            request_id=f"r{index}",
            attempt=1,
            epoch=1,
            phase="both",
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            sampling=sampling_of(index, rng.randint(1, 70)),
        )
        world.engine.deliver(EngineSubmit(0, submit))
        for _ in range(rng.randint(0, 8)):
            world.turn()
    world.assert_idle()
    answers = {request_id: stream.token_ids for request_id, stream in world.streams.items()}
    return Answers(submits, answers, world.audit().counters["retractions"])

"""Decode steps that go on as before: what is counted once for all rows, and the messages about them."""

from __future__ import annotations

import random
from collections import deque

import pytest

from phloem.shared.block_hash import BlockHasher
from phloem.shared.engine.block_changes import TreeEvents
from phloem.shared.engine.kv_pool import KVPool
from phloem.shared.engine.limits import Limits
from phloem.shared.engine.outbox import Outbox
from phloem.shared.engine.page_account import PageAccount
from phloem.shared.engine.radix_tree import RadixTree
from phloem.shared.engine.requests import Request
from phloem.shared.engine.scheduler import Scheduler
from phloem.shared.engine.step_plan import StepPlan
from phloem.shared.protocol.cluster import WorkerLoad
from phloem.shared.protocol.engine import EngineUp, StepReport
from phloem.shared.protocol.session import SamplingParams, Submit, TokensOut

PAGE_SIZE = 4


class World:
    """A scheduler and an outbox; the device makes token `position` of each row, `depth` steps behind."""

    def __init__(self, depth: int) -> None:
        account = PageAccount(KVPool(64), RadixTree(PAGE_SIZE), BlockHasher(b"test"))
        self.scheduler = Scheduler(Limits(256, 16, 100), account)
        self.outbox = Outbox(self.send)
        self.in_flight: deque[StepPlan] = deque()
        self.depth = depth
        self.tokens: dict[str, list[int]] = {}
        self.gateways: dict[str, int] = {}
        self.num_same = 0

    def add(self, name: str, num_prompt_tokens: int, max_tokens: int, stop: tuple[int, ...] = ()) -> Request:
        prompt = [1000 + len(self.gateways)] * num_prompt_tokens
        sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop)
        submit = Submit(
            request_id=name,
            attempt=1,
            epoch=1,
            phase="both",
            token_ids=prompt,
            num_prompt_tokens=num_prompt_tokens,
            sampling=sampling,
        )
        self.gateways[name] = len(self.gateways) % 2
        request = Request(
            submit,
            gateway=self.gateways[name],
            order=len(self.gateways),
            eos_token_ids=(),
            context_length=1000,
            now_s=0.0,
        )
        self.scheduler.submit(request)
        return request

    def step(self) -> None:
        """Launches one, and collects the oldest when `depth` are in flight, or nothing was to be launched."""
        plan = self.scheduler.schedule().plan
        if plan.num_rows:
            self.scheduler.launched(plan)
            self.in_flight.append(plan)
        if self.in_flight and (len(self.in_flight) > self.depth or not plan.num_rows):
            self.collect()

    def collect(self) -> None:
        plan = self.in_flight.popleft()
        tokens = [row.start + row.num_tokens for row in plan.rows if row.samples]
        made = self.scheduler.collect(plan, tokens)
        self.num_same += made.same
        self.outbox.tokens(made, 0.0)
        self.outbox.flush(0, TreeEvents([], []), WorkerLoad(), 0.0, busy=False)

    def send(self, message: EngineUp) -> None:
        assert isinstance(message, StepReport)
        for group in message.outputs:
            for output in group.outputs:
                assert isinstance(output, TokensOut)
                assert group.gateway == self.gateways[output.request_id]
                known = self.tokens.setdefault(output.request_id, [])
                assert output.start == len(known)
                assert bool(output.timeline) == (not known)
                known += output.token_ids

    def drain(self) -> None:
        while self.scheduler.num_requests:
            self.step()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_tokens_and_messages_are_those_of_steps_that_ask_every_request(depth: int) -> None:
    world = World(depth)
    world.add("long", 5, 40)
    world.add("short", 9, 12)
    world.add("stops", 7, 40, stop=(30,))  # the others make a 30 as well, in other steps, and go on
    world.drain()
    assert world.tokens["long"] == [*range(5, 45)]
    assert world.tokens["short"] == [*range(9, 21)]
    assert world.tokens["stops"] == [*range(7, 31)]
    assert world.num_same > 15


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_who_asks_for_a_request_sees_how_far_it_is(depth: int) -> None:
    world = World(depth)
    request = world.add("one", 6, 50)
    for _ in range(20):
        world.step()
    assert world.num_same > 10
    found = world.scheduler.get(request.key)
    assert found is request
    assert request.num_in_flight == request.num_pending == len(world.in_flight) == depth
    assert request.num_computed_tokens == len(request.token_ids) - 1 + depth
    world.step()
    assert world.scheduler.requests() == [request]
    assert request.num_computed_tokens == len(request.token_ids) - 1 + depth
    world.scheduler.end(request)
    world.drain()


def test_requests_come_and_go_at_any_time() -> None:
    rng = random.Random(7)
    for round_ in range(40):
        world, wanted = World(round_ % 3), {}
        for number in range(8):
            length, count = rng.randint(1, 12), rng.randint(1, 15)
            request = world.add(f"r{number}", length, count)
            wanted[request.request_id] = [*range(length, length + count)]
            for _ in range(rng.randint(0, 8)):
                world.step()
            if rng.random() < 0.2 and world.scheduler.get(request.key) is request:
                world.scheduler.end(request)
                wanted[request.request_id] = world.tokens.get(request.request_id, [])[:]
        world.drain()
        assert {name: world.tokens.get(name, []) for name in wanted} == wanted
        assert world.scheduler.num_queued_tokens == 0

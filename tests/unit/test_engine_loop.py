"""The engine's turns with a device that runs ahead: exact tokens, pages kept while a step uses them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.shared.engine.outbox import MAX_SILENCE_S
from phloem.shared.engine.step_plan import StepPlan
from phloem.shared.protocol.engine import EngineAbort
from phloem.shared.protocol.session import PeerRef, TokensOut
from tests.support.engine_world import EngineWorld, FakeStep, next_tokens


def test_tokens_are_exact_while_the_device_runs_ahead() -> None:
    world = EngineWorld()
    prompts = {f"r{index}": [index + 1] * (3 * index + 1) for index in range(6)}
    for request_id, prompt in prompts.items():
        world.submit(request_id, prompt, 20)
    world.assert_idle()
    for request_id, prompt in prompts.items():
        stream = world.streams[request_id]
        assert stream.token_ids == next_tokens(prompt, 20)
        assert (stream.finish_reason, stream.ended) == ("length", "finished")
    assert world.device.most_in_flight == 2


def test_step_is_launched_before_the_results_of_the_one_before_are_taken() -> None:
    world = EngineWorld()
    stream = world.submit("r", [1, 2, 3], 10)
    world.turn()
    assert (world.device.num_launched, world.device.num_collected) == (1, 0)
    world.turn()
    assert (world.device.num_launched, world.device.num_collected) == (2, 1)
    assert [row.from_device for row in world.device.plans[1].rows] == [True]
    assert stream.token_ids == []
    world.turn()
    assert stream.token_ids == next_tokens([1, 2, 3], 1)
    world.assert_idle()


def test_engine_whose_requests_all_wait_is_not_silent() -> None:
    """Its front would take it for hung, and kill it."""
    world = EngineWorld()
    stream = world.submit("r", [1, 2, 3], phase="decode", peer=PeerRef("prefill", 1))
    world.run()
    said = len(world.reports)
    world.turn()
    assert len(world.reports) == said
    world.now_s += MAX_SILENCE_S
    world.turn()
    assert len(world.reports) == said + 1 and not world.reports[-1].outputs
    world.turn(EngineAbort("r", 1))
    world.turn()
    assert stream.ended == "aborted"
    said = len(world.reports)
    world.now_s += 10 * MAX_SILENCE_S
    world.turn()
    assert len(world.reports) == said


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_without_overlap_no_two_steps_are_in_flight(runs_ahead: bool) -> None:
    world = EngineWorld(overlap=False, runs_ahead=runs_ahead)
    stream = world.submit("r", [1, 2, 3], 10)
    world.assert_idle()
    assert stream.token_ids == next_tokens([1, 2, 3], 10)
    assert world.device.most_in_flight == 1
    assert not any(row.from_device for plan in world.device.plans for row in plan.rows)


def test_known_end_wastes_no_row_and_a_surprising_one_at_most_one() -> None:
    for runs_ahead, stop_rows in ((True, 6), (False, 5)):
        world = EngineWorld(runs_ahead=runs_ahead)
        world.submit("length", [1, 2, 3], 5)
        world.run()
        assert world.device.num_rows == 5
        stop = next_tokens([4, 5], 5)[-1]
        stream = world.submit("stop", [4, 5], 50, stop=(stop,))
        world.assert_idle()
        assert stream.token_ids == next_tokens([4, 5], 5)
        assert stream.finish_reason == "stop"
        assert world.device.num_rows - 5 == stop_rows


def test_pages_return_only_after_the_step_that_uses_them() -> None:
    world = EngineWorld()
    stream = world.submit("r", [1] * 10, 50, stop=(next_tokens([1] * 10, 3)[-1],))
    world.turn_until(lambda: world.device.num_launched == 4)  # the fourth step computes the wasted row
    assert world.device.num_collected == 3
    reply = world.audit()
    assert stream.ended == "finished"
    assert reply.num_requests == 1 and reply.request_pages > 0
    assert world.device.num_collected == 4
    reply = world.audit()
    assert reply.num_requests == reply.request_pages == 0
    world.assert_idle()


def test_aborted_request_keeps_its_pages_while_its_step_is_on_the_device() -> None:
    world = EngineWorld()
    stream = world.submit("r", [1] * 10, 50)
    other = world.submit("other", [2] * 10, 50)
    world.turn()
    assert (world.device.num_launched, world.device.num_collected) == (1, 0)
    world.engine.deliver(EngineAbort("r", 1))
    assert world.audit().num_requests == 2
    assert stream.ended == "aborted" and stream.token_ids == []
    assert world.device.num_collected == 1
    assert world.audit().num_requests == 1
    world.assert_idle()
    assert other.token_ids == next_tokens([2] * 10, 50)


def test_waiting_request_runs_at_once_when_a_last_step_frees_its_pages() -> None:
    """The step is collected after the turn has planned: the loop must not go to sleep on that."""
    world = EngineWorld(num_pages=10, page_size=1)
    first = world.submit("first", [1] * 6, 4, stop=(next_tokens([1] * 6, 2)[-1],))
    world.turn()
    second = world.submit("second", [2] * 6, 3)
    while world.turn():
        pass
    assert (first.ended, second.ended) == ("finished", "finished")
    world.assert_idle()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_workload_gets_its_tokens_or_its_abort(data: st.DataObject) -> None:
    page_size = data.draw(st.sampled_from([1, 2, 4]))
    world = EngineWorld(
        num_pages=data.draw(st.integers(12, 40)),
        page_size=page_size,
        budget=data.draw(st.integers(3, 40)),
        slots=data.draw(st.integers(1, 6)),
        runs_ahead=data.draw(st.booleans()),
        overlap=data.draw(st.booleans()),
    )
    rng = random.Random(data.draw(st.integers(0, 10_000)))
    room = min(world.engine._account.pool.num_pages * page_size, 150)
    want: dict[str, list[int]] = {}
    aborted: set[str] = set()
    for index in range(data.draw(st.integers(1, 10))):
        request_id = f"r{index}"
        prompt = [rng.randint(1, 2)] * rng.randint(1, max(1, room // 2))
        count = rng.randint(1, max(1, room - len(prompt) - 1))
        expected = next_tokens(prompt, count)
        stop = rng.choice([*expected, 500])
        want[request_id] = expected[: expected.index(stop) + 1] if stop in expected else expected
        world.submit(request_id, prompt, count, stop=(stop,))
        for _ in range(rng.randint(0, 3)):
            world.audit()
        if rng.random() < 0.2:
            victim = f"r{rng.randint(0, index)}"
            aborted.add(victim)
            world.turn(EngineAbort(victim, 1))
    world.assert_idle()
    for request_id, expected in want.items():
        stream = world.streams[request_id]
        if stream.ended == "aborted":
            assert request_id in aborted
            assert stream.token_ids == expected[: len(stream.token_ids)]
        else:
            assert stream.ended == "finished"
            assert stream.token_ids == expected


def test_resumed_request_goes_on_counting_its_tokens() -> None:
    world = EngineWorld()
    prompt = [3, 1, 4]
    known = prompt + next_tokens(prompt, 4)
    stream = world.submit("r", known, 10, num_prompt_tokens=3)
    world.assert_idle()
    assert stream.token_ids == next_tokens(prompt, 10)[4:]


def test_report_says_what_was_cached_and_when_with_the_first_token_only() -> None:
    world = EngineWorld()
    world.submit("first", [7] * 17, 3)
    world.run()
    world.submit("second", [7] * 17, 3)
    world.assert_idle()
    groups = [group for report in world.reports for group in report.outputs]
    tokens = [o for group in groups for o in group.outputs if isinstance(o, TokensOut)]
    second = [output for output in tokens if output.request_id == "second"]
    assert [output.num_cached_tokens for output in second] == [16, 0, 0]
    assert [sorted(output.timeline) for output in second] == [["first_token", "queued"], [], []]


def test_pages_that_a_retracted_request_finds_again_are_not_reported_as_cached() -> None:
    """It was retracted in the middle of its prompt, and 6 of its pages stayed in the tree."""
    world = EngineWorld(num_pages=22, page_size=1, budget=2)
    world.submit("first", [1] * 4, 10)
    stream = world.submit("second", [2] * 12, 3)
    world.assert_idle()
    assert world.audit().counters["retractions"] == 1
    assert stream.token_ids == next_tokens([2] * 12, 3)
    assert sum(row.num_tokens for plan in world.device.plans for row in plan.rows) == 13 + 14
    assert stream.num_cached_tokens == 0


def test_without_the_radix_cache_nothing_is_kept() -> None:
    world = EngineWorld(num_pages=20, reuse=False)
    streams = [world.submit(f"r{index}", [7] * 17, 20) for index in range(4)]
    world.assert_idle()
    assert world.audit().tree_pages == 0
    for stream in streams:
        assert stream.token_ids == next_tokens([7] * 17, 20)
        assert stream.num_cached_tokens == 0


def test_outputs_of_all_requests_of_a_step_are_in_one_report_by_gateway() -> None:
    world = EngineWorld(slots=8)
    for index in range(8):
        world.submit(f"r{index}", [index + 1], 6, gateway=index % 2)
    world.assert_idle()
    full = [report for report in world.reports if report.outputs]
    assert all(len({group.gateway for group in r.outputs}) == len(r.outputs) for r in full)
    first = full[0]
    assert [(group.gateway, len(group.outputs)) for group in first.outputs] == [(0, 4), (1, 4)]
    assert len(full) <= world.device.num_launched + 1


def test_failure_of_the_device_ends_the_loop_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = EngineWorld()

    def broken(plan: StepPlan, watch: object = None) -> FakeStep:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(world.device, "launch", broken)
    world.submit("r", [1])
    with pytest.raises(RuntimeError, match="the device is gone"):
        world.engine.run()

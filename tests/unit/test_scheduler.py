"""The scheduler against random workloads: progress, one owner per page, and the limits of each step."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.shared.engine.admission import MAX_PASSES
from phloem.shared.engine.limits import Limits
from phloem.shared.engine.requests import Status
from phloem.shared.errors import PhloemError
from tests.support.scheduler_world import World


def expected_tokens(prompt_length: int, count: int) -> list[int]:
    return [(prompt_length + i) % 97 + 1 for i in range(count)]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_request_gets_its_tokens_whatever_the_pressure(data: st.DataObject) -> None:
    world = World(
        num_pages=data.draw(st.integers(12, 40)),
        page_size=data.draw(st.sampled_from([1, 2, 4])),
        budget=data.draw(st.integers(3, 40)),
        slots=data.draw(st.integers(1, 6)),
        depth=data.draw(st.integers(1, 3)),
    )
    rng = random.Random(data.draw(st.integers(0, 10_000)))
    room = world.pool.num_pages * world.tree.page_size
    want: dict[str, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        length = rng.randint(1, max(1, room // 2))
        count = rng.randint(1, max(1, room - length - 1))
        base = rng.randint(1, 2)
        request = world.add([base] * length, count)
        want[request.request_id] = expected_tokens(length, count)
        for _ in range(rng.randint(0, 3)):
            world.step()
            world.audit()
        if rng.random() < 0.2:
            world.scheduler.end(request)
            want.pop(request.request_id, None)
    world.drain()
    for request_id, tokens in want.items():
        assert world.made[request_id] == tokens
        assert world.finished[request_id] == "length"
    assert world.scheduler.num_running == world.scheduler.num_waiting == 0
    assert world.tree.num_locked_pages == 0
    assert world.pool.num_free_pages + world.tree.num_pages == world.pool.num_pages


def test_step_never_exceeds_its_token_budget_and_mixes_decode_with_chunks() -> None:
    world = World(budget=8)
    world.add([5] * 3, 10)
    assert world.step().num_tokens == 3
    world.add([6] * 30, 3)
    plan = world.step()
    assert plan.num_tokens == 8
    assert sorted(row.num_tokens for row in plan.rows) == [1, 7]
    world.drain()


def test_prompt_tokens_beside_decode_rows_have_a_bound_of_their_own() -> None:
    world = World(num_pages=200, limits=Limits(64, 8, 100, max_mixed_tokens=8))
    world.add([5] * 3, 40)
    world.add([6] * 50, 20)
    assert world.step().num_tokens == 53, "nobody decodes yet"
    world.add([7] * 20, 20)
    world.add([8] * 5, 20)
    for expected in ([1, 1, 8], [1, 1, 8], [1, 1, 4, 4], [1, 1, 1, 1], [1, 1, 1, 1]):
        assert [row.num_tokens for row in world.step().rows] == expected
    world.drain()


def test_overlap_feeds_the_unknown_token_from_the_device() -> None:
    world = World(depth=2)
    world.add([5] * 3, 4)
    assert [row.from_device for row in world.step().rows] == [False]
    assert [row.from_device for row in world.step().rows] == [True]
    world.drain()
    assert world.made["r1"] == expected_tokens(3, 4)


def test_stop_token_ends_a_request_and_wastes_at_most_one_row() -> None:
    world = World(depth=2)
    stop = expected_tokens(3, 2)[1]
    world.add([5] * 3, 50, stop=(stop,))
    rows = 0
    while world.scheduler.requests():
        rows += len(world.step().rows)
    assert world.made["r1"] == expected_tokens(3, 2)
    assert world.finished["r1"] == "stop"
    assert rows <= 3
    world.audit()


def test_second_request_reuses_the_first_ones_pages() -> None:
    world = World()
    world.add([7] * 17, 2)
    world.drain()
    request = world.add([7] * 17, 2)
    plan = world.step()
    assert request.num_cached_tokens == 16
    assert plan.num_tokens == 1
    world.drain()


def test_prefix_is_shared_while_the_first_request_still_runs() -> None:
    world = World()
    world.add([7] * 17, 20)
    world.step()
    request = world.add([7] * 17, 2)
    world.step()
    assert request.num_cached_tokens == 16
    world.drain()


def test_youngest_is_retracted_and_resumed() -> None:
    world = World(num_pages=40, page_size=4)
    first = world.add([1] * 12, 100)
    second = world.add([2] * 12, 100)
    world.drain()
    assert world.scheduler.num_retractions > 0
    assert world.made[first.request_id] == world.made[second.request_id] == expected_tokens(12, 100)


def test_prefill_request_makes_one_token_and_keeps_its_pages_until_it_is_ended() -> None:
    world = World()
    request = world.add([3] * 9, 20, phase="prefill")
    world.step()
    assert request.status is Status.SENDING
    assert world.made["r1"] == expected_tokens(9, 1)
    assert len(request.page_ids) == 3
    assert world.step().rows == []
    world.scheduler.end(request)
    world.audit()
    assert world.tree.num_pages == 2


def test_decode_request_reserves_receives_and_runs() -> None:
    world = World()
    request = world.add([3] * 9, 4, phase="decode")
    scheduled = world.scheduler.schedule()
    assert scheduled.reserved == [request] and scheduled.plan.rows == []
    assert len(request.page_ids) == 3
    world.audit()
    world.scheduler.received(request, [10])
    world.drain()
    assert world.made["r1"] == expected_tokens(10, 3)


def test_request_that_does_not_fit_is_passed_only_a_bounded_number_of_times() -> None:
    world = World(num_pages=40, page_size=1, budget=64, slots=2)
    world.add([9] * 10, 25)
    world.step()
    big = world.add([1] * 36, 2)
    while big.status is Status.WAITING and big.times_passed <= MAX_PASSES:
        if world.scheduler.num_waiting < 3:
            world.add([2], 1)
        world.step()
    assert big.times_passed <= MAX_PASSES
    world.drain()
    assert world.made[big.request_id] == expected_tokens(36, 2)


def test_request_longer_than_the_pool_is_refused_with_the_remedy() -> None:
    world = World(num_pages=4, page_size=4)
    with pytest.raises(PhloemError, match="--max-total-tokens"):
        world.add([1] * 16)


def test_full_queue_is_refused_retryably() -> None:
    world = World(limits=Limits(8, 1, 1))
    world.add([1] * 4)
    with pytest.raises(PhloemError) as caught:
        world.add([1] * 4)
    assert caught.value.retryable and caught.value.code == "queue_full"


def test_longest_prefix_first_takes_the_cached_request() -> None:
    world = World(limits=Limits(64, 1, 100, longest_prefix_first=True))
    world.add([7] * 16, 1)
    world.drain()
    world.add([8] * 16, 1)
    cached = world.add([7] * 16, 1)
    plan = world.step()
    assert [row.request for row in plan.rows] == [cached]
    world.drain()


def test_queued_tokens_are_what_the_device_has_yet_to_compute_here() -> None:
    world = World(budget=8, depth=2)
    world.add([*range(1, 21)])
    assert world.scheduler.num_queued_tokens == 20
    world.step()  # eight tokens are on the device, and not computed yet
    assert world.scheduler.num_queued_tokens == 20
    world.collect()
    assert world.scheduler.num_queued_tokens == 12


def test_what_the_tree_holds_and_what_a_peer_computes_is_not_queued() -> None:
    world = World()
    world.add([*range(1, 21)])
    world.drain()
    world.add([*range(1, 17), 50, 51])
    assert world.scheduler.num_queued_tokens == 2
    world.add([*range(60, 80)], phase="decode")
    assert world.scheduler.num_queued_tokens == 2

"""Two workers never wait for each other: one holds what the other needs, and the other way round."""

from __future__ import annotations

import random

import pytest

from tests.support.engine_pair import Pair, assert_tokens


def pass_time(pair: Pair, seconds: float) -> None:
    for world in (pair.prefill, pair.decode):
        world.now_s += seconds
    pair.run()


def test_request_without_room_at_decode_makes_way_for_one_that_has_room() -> None:
    """Decode holds room for `small`, which waits at prefill for the pages of `large`, which does not fit at
    decode before `small` is done."""
    pair = Pair(prefill_pages=24, decode_pages=24)
    large_prompt, small_prompt = [1] * 76, [2] * 40
    at_decode = pair.submit_decode("small", small_prompt)
    pair.decode.turn()
    large = pair.submit("large", large_prompt)
    small = pair.submit_prefill("small", small_prompt)
    pair.run()
    assert large.prefill.token_ids and not small.token_ids
    pass_time(pair, 0.9)
    assert large.codes == [None, None], "decode may have room any moment"
    pass_time(pair, 0.4)
    assert large.codes == ["handover_no_room", "handover_cancelled"]
    assert large.prefill.error is not None and large.prefill.error.retryable
    pair.assert_idle()
    assert small.ended == "handed_over"
    assert at_decode.ended == "finished"


def test_request_keeps_its_pages_while_nobody_needs_them_or_something_moves() -> None:
    pair = Pair(decode_slots=1)
    busy = pair.submit("busy", [1] * 9, 100)
    waiting = pair.submit("waiting", [2] * 9)
    for _ in range(20):
        pair.step()
        for world in (pair.prefill, pair.decode):
            world.now_s += 1.0
    assert busy.decode.ended is None and waiting.prefill.ended is None
    pair.assert_idle()
    assert_tokens(busy, [1] * 9, 100)
    assert_tokens(waiting, [2] * 9, 8)


@pytest.mark.parametrize("seed", range(40))
def test_tight_pools_settle_in_seconds(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(prefill_pages=rng.randint(24, 40), decode_pages=rng.randint(24, 40))
    prompts = [[rng.randint(1, 90)] * rng.randint(1, 80) for _ in range(8)]
    all_sides = [pair.submit(f"r{index}", prompt) for index, prompt in enumerate(prompts)]
    pair.run()
    for _ in range(12):
        pass_time(pair, 0.3)
    pair.assert_idle()
    for sides, prompt in zip(all_sides, prompts, strict=True):
        if sides.prefill.ended == "failed":
            assert sides.codes == ["handover_no_room", "handover_cancelled"]
        else:
            assert_tokens(sides, prompt, 8)

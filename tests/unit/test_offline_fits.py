"""What an engine can't hold is refused before anything is measured, with the flag that helps."""

from __future__ import annotations

import pytest

from phloem.shared.engine.offline.fits import Room, check_fits
from phloem.shared.engine.offline.work import OfflineWork
from phloem.shared.errors import ConfigError

ROOM = Room(
    max_running_requests=256,
    context_length=4096,
    model_context=8192,
    page_size=16,
    num_pages=64 * 1024 // 16 * 2,
    chunk_tokens=8192,
)


def decode(*shapes: tuple[int, int], steps: int = 64) -> OfflineWork:
    return OfflineWork(prefill=(), decode=shapes, steps=steps)


def prefill(*lengths: int) -> OfflineWork:
    return OfflineWork(prefill=lengths, decode=())


def refusal(work: OfflineWork, room: Room = ROOM) -> str:
    with pytest.raises(ConfigError) as refused:
        check_fits(work, room)
    return str(refused.value)


@pytest.mark.parametrize("work", [prefill(), prefill(1, 512, 4095), decode((1, 64), (256, 64), (64, 1024))])
def test_what_fits_is_not_refused(work: OfflineWork) -> None:
    check_fits(work, ROOM)


def test_more_requests_than_slots_name_the_slots_not_the_pool() -> None:
    assert refusal(decode((1, 64), (300, 64))) == (
        "--decode 300x64: the engine runs 256 requests at once: raise --max-running-requests to 300, "
        "or lower the batch"
    )
    check_fits(decode((300, 64)), ROOM._replace(max_running_requests=300))


def test_a_prompt_needs_room_for_the_token_that_it_makes() -> None:
    assert refusal(prefill(512, 4096)) == (
        "--prefill 4096: a request grows to 4097 tokens, over the context of 4096: "
        "raise --context-length to 4097, or lower it to 4095"
    )
    check_fits(prefill(4095), ROOM)
    check_fits(prefill(4096), ROOM._replace(context_length=4097))


def test_a_context_that_the_model_has_not_got_can_only_be_lowered() -> None:
    room = ROOM._replace(context_length=8192)
    assert refusal(prefill(9000), room) == (
        "--prefill 9000: a request grows to 9001 tokens, over the context of 8192: lower it to 8191"
    )


def test_a_batchs_longest_request_stays_within_the_context() -> None:
    assert refusal(decode((64, 4096))) == (
        "--decode 64x4096: a request grows to 4136 tokens, over the context of 4096: "
        "raise --context-length to 4136, or lower it to 64x4056"
    )
    small = ROOM._replace(num_pages=1 << 20)
    check_fits(decode((64, 4056)), small)
    check_fits(decode((64, 4096)), small._replace(context_length=4136))
    assert "over the context" in refusal(decode((64, 4057)), small)


def test_steps_that_no_context_holds_are_to_be_fewer() -> None:
    assert refusal(decode((1, 64), steps=5000)).endswith("or lower --steps")


def test_a_pool_that_is_too_small_says_which_would_do() -> None:
    words = refusal(decode((128, 1024)))
    assert words == (
        "--decode 128x1024: it needs KV pages for 136064 tokens, and the pool holds 131072: give "
        "--max-total-tokens 136064, or lower it"
    )
    check_fits(decode((128, 1024)), ROOM._replace(num_pages=136_064 // 16))
    assert "needs KV pages for 2064 tokens" in refusal(prefill(2050), ROOM._replace(num_pages=10))


def test_a_chunk_that_starts_requests_one_after_the_other_is_refused() -> None:
    assert refusal(decode((64, 1024)), ROOM._replace(chunk_tokens=256)) == (
        "--decode 64x1024: with --chunked-prefill-size 256 its first requests would be far ahead when the "
        "last one starts: raise it to 512, or lower the batch"
    )
    check_fits(decode((64, 1024)), ROOM._replace(chunk_tokens=512))

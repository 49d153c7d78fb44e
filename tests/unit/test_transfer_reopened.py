"""A channel that is lost and opens again while the engine is about to send on it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from phloem.shared.engine.handover_send import HandoverSender
from phloem.shared.engine.requests import Request
from phloem.shared.engine.step_plan import Row
from phloem.shared.protocol.session import PeerRef, SamplingParams, Submit
from phloem.shared.protocol.transfer import Ready
from phloem.shared.transfer.events import ChannelLost, ChannelOpened, PieceReceived
from phloem.shared.transfer.pending import DONE
from phloem.shared.transfer.staging import StagingSlot
from tests.support.handover_wire import FakePageStore
from tests.support.transfer import DECODE, NUM_SLOTS, PREFILL, Pair, joined, piece

PAGE = 4  # tokens
PAGES = [0, 1]


@pytest.fixture
def pair() -> Iterator[Pair]:
    with joined(staging_bytes=FakePageStore().layer_page_bytes) as pair:  # each layer of a page is a piece
        yield pair


def reopen(pair: Pair) -> None:
    pair.decode.endpoint.peer_down(PREFILL)
    pair.prefill.next_of(ChannelLost)
    pair.prefill.next(ChannelOpened)
    pair.decode.next_of(ChannelOpened)


def interrupt(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The channel is lost and opens again before the engine's second slot; returns whose slots it gets. The
    first two pieces go together."""
    acquire, names = pair.prefill.endpoint.acquire_slot, list[str]()

    def acquire_slot(peer: PeerRef) -> StagingSlot | None:
        if len(names) == 1:
            reopen(pair)
        slot = acquire(peer)
        if slot is not None:
            names.append(slot.channel_name)
        return slot

    monkeypatch.setattr(pair.prefill.endpoint, "acquire_slot", acquire_slot)
    return names


def prompt_to_hand_over() -> Request:
    submit = Submit(
        request_id="r",
        attempt=1,
        epoch=1,
        phase="prefill",
        token_ids=list(range(PAGE * len(PAGES))),
        num_prompt_tokens=PAGE * len(PAGES),
        sampling=SamplingParams(max_tokens=4),
        peer=DECODE,
    )
    request = Request(submit, gateway=0, order=0, eos_token_ids=(), context_length=200, now_s=0.0)
    request.page_ids = PAGES
    return request


def test_channel_that_opens_again_in_the_middle_of_a_turn_keeps_all_of_its_slots(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel_names, store = interrupt(pair, monkeypatch), FakePageStore()
    store.fill(PAGES, "r")
    sender = HandoverSender(pair.prefill.endpoint, store, PAGE, timeout_s=10.0, clock=time.monotonic)
    request = prompt_to_hand_over()
    sender.begin(request)
    sender.on_ready(DECODE, Ready("r", 1, 0))
    request.num_computed_tokens = request.num_submitted_tokens
    watch = sender.watch([Row(request, 0, request.num_submitted_tokens, True, False)])
    assert watch is not None
    watch.all_at(DONE)  # the device has computed it: all of it would go now

    ended = sender.pump()
    assert channel_names[0] != channel_names[1], "slots of both were taken in one turn"
    assert [(end.key, end.error and end.error.code) for end in ended] == [(request.key, "channel_lost")]
    for page in range(NUM_SLOTS):
        assert pair.send(piece("next", page, store.layer_page_bytes), fill=page)
    assert [pair.decode.next_of(PieceReceived).header.request_id for _ in range(NUM_SLOTS)] == ["next"] * 3

"""Openings that take long while nothing is wrong, and peers that leave in the middle of one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Opened
from phloem.shared.transfer import opening
from phloem.shared.transfer.dialer import Dialer
from phloem.shared.transfer.events import ChannelOpened, Side
from phloem.shared.transfer.frames import FrameSocket
from phloem.shared.transfer.opening import StuckOpenings
from phloem.shared.transfer.planes import DataPlane, PlaneSpec, open_plane
from phloem.shared.transfer.rendezvous import ControlStore
from tests.support.transfer import (
    DECODE,
    NUM_SLOTS,
    PREFILL,
    SLOT_BYTES,
    Recorded,
    RoguePeer,
    accept_open,
    dial_open,
    one_end,
    open_request,
    transfer_config,
    wait_until,
)
from tests.support.transfer_opening import Hanging, Hangs, both_ends

TIMEOUT_S = 0.3
SOON_S = 2.0  # what cleaning up may take
PATIENT_S = 60.0  # longer than a test may take


@pytest.fixture
def hangs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hangs]:
    hangs = Hangs(monkeypatch)
    yield hangs
    hangs.end()


def test_opening_may_take_longer_than_an_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL needs seconds where engines start."""
    may_join, calls = threading.Event(), list[str]()

    def open_late(spec: PlaneSpec, store: ControlStore) -> DataPlane:
        calls.append(spec.side)
        assert may_join.wait(PATIENT_S)
        return open_plane(spec, store)

    monkeypatch.setattr(opening, "open_plane", open_late)
    with both_ends(TIMEOUT_S, PATIENT_S) as (prefill, decode):
        prefill.endpoint.peer_up(DECODE, decode.endpoint.address)
        wait_until(lambda: len(calls) == 2)
        prefill.assert_silent(3 * TIMEOUT_S)
        may_join.set()
        prefill.next(ChannelOpened)
        decode.next(ChannelOpened)
        assert sorted(calls) == ["decode", "prefill"], "it is the first one"


@pytest.mark.parametrize("late", ["prefill", "decode"])
def test_side_that_has_opened_does_not_take_one_that_still_opens_for_silent(
    monkeypatch: pytest.MonkeyPatch, late: Side
) -> None:
    may_open, move_first_byte = threading.Event(), opening.move_first_byte

    def move_and_dawdle(plane: DataPlane, spec: PlaneSpec) -> None:
        move_first_byte(plane, spec)
        assert spec.side != late or may_open.wait(PATIENT_S)

    monkeypatch.setattr(opening, "move_first_byte", move_and_dawdle)
    with both_ends(TIMEOUT_S, PATIENT_S) as (prefill, decode):
        prefill.endpoint.peer_up(DECODE, decode.endpoint.address)
        early, other = (decode, prefill) if late == "prefill" else (prefill, decode)
        early.next(ChannelOpened)
        early.assert_silent(4 * TIMEOUT_S)
        other.assert_silent()
        may_open.set()
        other.next(ChannelOpened)


def assert_noticed_when_it_leaves(rogue: RoguePeer, ours: Recorded, hanging: Hanging) -> None:
    wait_until(lambda: hanging.num_calls == 1)
    assert ours.endpoint.status().staging_lent_bytes > 0
    rogue.close()
    wait_until(lambda: ours.endpoint.status().staging_lent_bytes == 0, SOON_S)


def test_prefill_peer_that_leaves_in_the_middle_of_an_opening_is_noticed_at_once(
    hangs: Hangs,
) -> None:
    hanging = hangs(1)
    with one_end(
        transfer_config(DECODE, accepts=True, timeout_s=PATIENT_S, opening_timeout_s=PATIENT_S)
    ) as decode:
        rogue, answer = dial_open(decode.endpoint.address, open_request())
        assert isinstance(answer, Opened)
        assert_noticed_when_it_leaves(rogue, decode, hanging)


def test_decode_peer_that_leaves_in_the_middle_of_an_opening_is_noticed_at_once(
    hangs: Hangs,
) -> None:
    hanging = hangs(1)
    with (
        one_end(transfer_config(PREFILL, timeout_s=PATIENT_S, opening_timeout_s=PATIENT_S)) as prefill,
        accept_open(prefill) as rogue,
    ):
        rogue.write(Opened(SLOT_BYTES, NUM_SLOTS))
        assert_noticed_when_it_leaves(rogue, prefill, hanging)


def test_peer_is_dialed_again_when_what_is_left_of_the_last_opening_has_ended(
    hangs: Hangs,
) -> None:
    hanging = hangs(2)
    with both_ends(PATIENT_S, PATIENT_S) as (prefill, decode):
        prefill.endpoint.peer_up(DECODE, decode.endpoint.address)
        wait_until(lambda: hanging.num_calls == 2)  # both sides
        decode.endpoint.peer_down(PREFILL)
        wait_until(lambda: prefill.endpoint.status().staging_lent_bytes == 0)
        with pytest.raises(TimeoutError):
            wait_until(lambda: hanging.num_calls > 2, 1.0)
        hanging.may_go_on.set()
        prefill.next(ChannelOpened)
        decode.next(ChannelOpened)


def test_peer_that_is_gone_is_not_dialed_when_the_wait_is_over(
    hangs: Hangs, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, waits, dials = hangs(2), list[float](), list[threading.Thread]()
    wait, connect = StuckOpenings.wait_for_end, Dialer._connect

    def noted_wait(stuck: StuckOpenings, peer: PeerRef, most_s: float, stop: threading.Event) -> None:
        waits.append(most_s)
        wait(stuck, peer, most_s, stop)

    def noted_connect(dialer: Dialer, deadline: float) -> FrameSocket:
        dials.append(threading.current_thread())
        return connect(dialer, deadline)

    monkeypatch.setattr(StuckOpenings, "wait_for_end", noted_wait)
    monkeypatch.setattr(Dialer, "_connect", noted_connect)
    with both_ends(PATIENT_S, PATIENT_S) as (prefill, decode):
        prefill.endpoint.peer_up(DECODE, decode.endpoint.address)
        wait_until(lambda: hanging.num_calls == 2)
        decode.endpoint.peer_down(PREFILL)
        wait_until(lambda: len(waits) == 2)
        prefill.endpoint.peer_down(DECODE)
        dials[0].join(SOON_S)
        assert not dials[0].is_alive() and len(dials) == 1

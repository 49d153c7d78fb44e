"""How often a peer is dialed that gives no channel, and when requests stop counting on it."""

from __future__ import annotations

import pytest

from phloem.shared.errors import ErrorInfo
from phloem.shared.transfer.redial import CUT_OFF_AFTER_S, MAX_PAUSE_S, MAX_REFUSED_PAUSE_S, Redial

LOST = ErrorInfo("channel_lost", "can't connect", retryable=True)
FULL = ErrorInfo("staging_full", "no memory", retryable=True)
OTHER_SECRET = ErrorInfo("unauthenticated", "another secret")


def test_peer_that_does_not_answer_is_dialed_often_and_cut_off_after_a_while() -> None:
    redial, now_s = Redial(), 100.0
    pauses = []
    while redial.cut_off(now_s) is None:
        pauses.append(redial.failed(LOST, now_s))
        now_s += pauses[-1]
    assert pauses[:6] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0][: len(pauses)]
    assert now_s - 100.0 == pytest.approx(CUT_OFF_AFTER_S, abs=MAX_PAUSE_S)
    assert redial.cut_off(now_s) == LOST
    assert [redial.failed(LOST, now_s) for _ in range(3)][-1] == MAX_PAUSE_S


@pytest.mark.parametrize("error", [FULL, OTHER_SECRET])
def test_peer_that_refuses_for_now_is_cut_off_at_once_and_dialed_ever_more_rarely(error: ErrorInfo) -> None:
    redial = Redial()
    pauses = [redial.failed(error, 0.0) for _ in range(8)]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert redial.cut_off(0.0) == error and max(pauses) == MAX_REFUSED_PAUSE_S


def test_channel_that_opens_ends_it() -> None:
    redial = Redial()
    for _ in range(8):
        redial.failed(FULL, 0.0)
    redial.opened(10.0)
    assert redial.cut_off(10.0) is None and redial.cut_off(99.0) is None
    redial.lost(LOST, 100.0)
    assert redial.failed(LOST, 10.0) == 0.05, "it lived long: dialed at once"
    assert redial.cut_off(100.0) is None


def test_channel_that_opens_and_breaks_again_and_again_is_dialed_less() -> None:
    redial, pauses = Redial(), []
    for n in range(6):
        redial.opened(float(n))
        redial.lost(LOST, n + 0.5)
        pauses.append(redial.failed(LOST, float(n)))
        assert redial.cut_off(n + 0.5) is None
    assert pauses == sorted(pauses) and pauses[-1] == MAX_PAUSE_S


def test_peer_that_dies_after_a_long_life_is_not_cut_off_by_its_age() -> None:
    redial = Redial()
    redial.opened(0.0)
    redial.lost(LOST, 1000.0)
    redial.failed(LOST, 0.0)
    redial.failed(LOST, 1000.1)
    assert redial.cut_off(1000.1) is None
    redial.failed(LOST, 1003.5)
    assert redial.cut_off(1003.5) == LOST


def test_peer_is_cut_off_while_its_lost_channel_is_not_let_go_of() -> None:
    """The attempt that it belongs to is not over until then, and no other one begins."""
    redial = Redial()
    redial.opened(0.0)
    redial.lost(LOST, 1000.0)
    assert redial.cut_off(1000.0 + CUT_OFF_AFTER_S - 0.1) is None
    assert redial.cut_off(1000.0 + CUT_OFF_AFTER_S) == LOST
    redial.opened(1010.0)
    assert redial.cut_off(1100.0) is None


def test_refusal_for_good_is_kept() -> None:
    redial = Redial()
    redial.refused(ErrorInfo("same_device", "one GPU"))
    error = redial.cut_off(0.0)
    assert error is not None and error.code == "same_device"

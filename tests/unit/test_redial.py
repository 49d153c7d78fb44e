"""How often a peer is dialed that gives no channel, and when requests stop counting on it."""

from __future__ import annotations

import pytest

from phloem.shared.errors import ErrorInfo
from phloem.shared.transfer.redial import CUT_OFF_AFTER_S, MAX_PAUSE_S, MAX_REFUSED_PAUSE_S, Redial

LOST = ErrorInfo("channel_lost", "can't connect", retryable=True)
FULL = ErrorInfo("staging_full", "no memory", retryable=True)


def test_peer_that_does_not_answer_is_dialed_often_and_cut_off_after_a_while() -> None:
    redial, now_s = Redial(), 100.0
    pauses = []
    while redial.cut_off is None:
        pauses.append(redial.failed(LOST, now_s, now_s))
        now_s += pauses[-1]
    assert pauses[:6] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0]
    assert now_s - pauses[-1] - 100.0 == pytest.approx(CUT_OFF_AFTER_S, abs=MAX_PAUSE_S)
    assert redial.cut_off == LOST


def test_peer_that_refuses_for_now_is_cut_off_at_once_and_dialed_ever_more_rarely() -> None:
    redial = Redial()
    pauses = [redial.failed(FULL, 0.0, 0.0) for _ in range(8)]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert redial.cut_off == FULL and max(pauses) == MAX_REFUSED_PAUSE_S


def test_channel_that_opens_ends_it() -> None:
    redial = Redial()
    for _ in range(8):
        redial.failed(FULL, 0.0, 0.0)
    redial.opened()
    assert redial.cut_off is None
    assert redial.failed(LOST, 10.0, 100.0) == 0.05, "it lived long: dialed at once"
    assert redial.cut_off is None


def test_channel_that_opens_and_breaks_again_and_again_is_dialed_less() -> None:
    redial, pauses = Redial(), []
    for n in range(6):
        redial.opened()
        pauses.append(redial.failed(LOST, float(n), n + 0.5))
    assert pauses == sorted(pauses) and pauses[-1] == MAX_PAUSE_S
    assert redial.cut_off is None


def test_peer_that_dies_after_a_long_life_is_not_cut_off_by_its_age() -> None:
    redial = Redial()
    redial.opened()
    redial.failed(LOST, 0.0, 1000.0)
    redial.failed(LOST, 1000.1, 1000.1)
    assert redial.cut_off is None
    redial.failed(LOST, 1003.5, 1003.5)
    assert redial.cut_off == LOST


def test_refusal_for_good_is_kept() -> None:
    redial = Redial()
    redial.refused(ErrorInfo("same_device", "one GPU"))
    assert redial.cut_off is not None and redial.cut_off.code == "same_device"

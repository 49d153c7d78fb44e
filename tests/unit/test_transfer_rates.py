"""The bandwidth that an endpoint measures, by which prefill cuts its layers into groups."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phloem.shared.protocol.session import PeerRef
from phloem.shared.transfer.stats import PeerMeter, PeerStats, SendRates, send_rates


@given(st.floats(1e6, 1e12), st.floats(1e6, 1e12), st.integers(1, 10_000))
def test_measured_bandwidth_is_that_of_the_last_pieces(
    before: float, now: float, num_pieces_before: int
) -> None:
    """However long a link was fast, or slow."""
    meter, at_s = PeerMeter(), 0.0
    for rate, count in ((before, min(num_pieces_before, 500)), (now, 1000)):
        for _ in range(count):
            meter.sent(1 << 20, at_s, at_s + (1 << 20) / rate)
            at_s += (1 << 20) / rate
    assert meter.read().send_bytes_per_s == pytest.approx(now, rel=0.02)


def test_measured_bandwidth_counts_bytes_not_pieces_and_no_pause() -> None:
    meter = PeerMeter()
    assert meter.read().send_bytes_per_s == 0.0
    meter.sent(900, 0.0, 9.0)
    meter.sent(100, 1000.0, 1000.1)  # ten times as fast, and small
    assert meter.read().send_bytes_per_s == pytest.approx(109.0, rel=0.02)


def test_each_peer_has_its_own_rate_and_one_that_has_none_yet_that_of_all() -> None:
    fast, slow, new = (PeerRef(name, 1) for name in ("fast", "slow", "new"))
    rates = send_rates(
        {
            fast: PeerStats(recent_bytes=300.0, recent_s=1.0),
            slow: PeerStats(recent_bytes=100.0, recent_s=3.0),
            new: PeerStats(),
        }
    )
    assert rates.overall == 100.0
    assert [rates.slowest([peer]) for peer in (fast, slow, new)] == [300.0, pytest.approx(100 / 3), 100.0]
    assert rates.slowest([fast, slow, new]) == rates.slowest([slow])
    nothing = send_rates({new: PeerStats()})
    assert nothing == SendRates() and nothing.slowest([new]) == 0.0

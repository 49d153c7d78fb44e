"""A peer that gets a SIGSTOP while a channel opens; one that is killed while another one hangs."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.support.transfer import wait_until
from tests.support.transfer_survivors import (
    survive_killed_beside_hanging,
    survive_stopped_decode,
    survive_stopped_prefill,
)

TIMEOUT_S = 1.0


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """What hung ends when its peer has died; Gloo takes its time."""
    yield
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("phloem-transfer")], 30.0)


@pytest.mark.parametrize("after_s", [0.0, 0.005])
def test_decode_peer_that_stops_while_a_channel_opens_holds_nobody_up(after_s: float) -> None:
    survive_stopped_decode("cpu", "cpu", after_s, TIMEOUT_S)


@pytest.mark.parametrize("after_s", [0.0, 0.005])
def test_prefill_peer_that_stops_while_a_channel_opens_holds_nobody_up(after_s: float) -> None:
    survive_stopped_prefill("cpu", "cpu", after_s, TIMEOUT_S)


def test_peer_that_dies_while_another_hangs_holds_nobody_up() -> None:
    survive_killed_beside_hanging("cpu", "cpu", TIMEOUT_S)

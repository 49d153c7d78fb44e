"""A peer that gets a SIGSTOP while NCCL opens a channel: at its id, in its bootstrap, at its first bytes; one
that is killed while another one hangs."""

from __future__ import annotations

import os

import pytest

from phloem.cli.up.devices import count_gpus
from tests.support.transfer_survivors import (
    survive_killed_beside_hanging,
    survive_stopped_decode,
    survive_stopped_prefill,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(count_gpus(os.environ) < 2, reason="needs two GPUs"),
]
TIMEOUT_S = 3.0
moments = pytest.mark.parametrize("after_s", [0.0, 0.02, 0.05, 0.1, 0.2, 0.4])


@moments
def test_decode_peer_that_stops_while_a_channel_opens_holds_nobody_up(after_s: float) -> None:
    survive_stopped_decode("cuda:1", "cuda:0", after_s, TIMEOUT_S)


@moments
def test_prefill_peer_that_stops_while_a_channel_opens_holds_nobody_up(after_s: float) -> None:
    survive_stopped_prefill("cuda:1", "cuda:0", after_s, TIMEOUT_S)


def test_peer_that_dies_while_another_hangs_holds_nobody_up() -> None:
    survive_killed_beside_hanging("cuda:1", "cuda:0", TIMEOUT_S)

"""Staging memory of channels that are lost and do not let go of it: nobody else ever gets that."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from phloem.shared.errors import PhloemError
from phloem.shared.transfer import channel, endpoint, opening
from phloem.shared.transfer.config import TransferConfig
from phloem.shared.transfer.events import ChannelLost, ChannelOpened, PieceReceived, Side
from phloem.shared.transfer.planes import DataPlane, PlaneSpec, open_plane
from phloem.shared.transfer.rendezvous import ControlStore
from phloem.shared.transfer.staging_pool import StagingPool
from tests.support.transfer import DECODE, PREFILL, Pair, piece, transfer_config, wait_until

BLOCK = 1 << 20
MAX_ABORT_S = 0.2


def config(*, peers: int, slots: int) -> TransferConfig:
    made = transfer_config(DECODE, staging_bytes=BLOCK)
    return msgspec.structs.replace(made, staging_slots=slots, max_peers=peers)


# -- the pool ------------------------------------------------------------------------------------------


def test_quarantined_memory_is_never_lent_again_and_others_still_get_theirs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = StagingPool(config(peers=3, slots=4))
    lost = pool.lend("from p1")
    quarantined = set(lost.blocks)
    assert len(quarantined) == 4
    lost.quarantine("the plane")
    lost.close()
    assert (pool.quarantined_bytes, pool.lent_bytes) == (4 * BLOCK, 0)
    assert (
        "the channel from p1 has ended, but NCCL has not let go of its staging memory (4 MiB)" in caplog.text
    )
    assert "Restart decode-a (epoch 7) to have it back" in caplog.text
    for _ in range(3):
        others = [pool.lend("from p1", 5.0), pool.lend("from p2")]
        assert all(other.blocks for other in others)
        assert not quarantined & {block for other in others for block in other.blocks}
        for other in others:
            other.close()
    assert (pool.quarantined_bytes, pool.lent_bytes) == (4 * BLOCK, 0)


def test_pool_of_which_nothing_is_left_says_that_a_restart_helps() -> None:
    pool = StagingPool(config(peers=1, slots=2))
    lost = pool.lend("to d")
    lost.quarantine("the plane")
    lost.close()
    began_s = time.monotonic()
    with pytest.raises(
        PhloemError, match=r"ended hold .*: start it again, lost channels keep 2 MiB until then"
    ) as caught:
        pool.lend("to d", 0.05)
    assert caught.value.code == "staging_full" and time.monotonic() - began_s < 2.0


def test_quarantined_memory_lowers_the_number_of_peers_only_when_none_is_left() -> None:
    pool = StagingPool(config(peers=2, slots=4))
    for name in ("a", "b"):  # whose peers gave one credit each
        lost = pool.lend(name)
        lost.slots("c", BLOCK, 1)
        lost.quarantine("the plane")
        lost.close()
    assert pool.quarantined_bytes == 2 * BLOCK
    others = [pool.lend("a"), pool.lend("c")]
    assert all(other.blocks for other in others)
    with pytest.raises(PhloemError, match="2 channels have it"):
        pool.lend("d")


# -- channels ------------------------------------------------------------------------------------------


class Clinging:
    """In the place of `open_plane`: `side`'s first plane is aborted, but `abort` does not end well."""

    def __init__(self, side: Side, abort: Callable[[], None]) -> None:
        self._side = side
        self._abort = abort
        self._has_one = False

    def __call__(self, spec: PlaneSpec, store: ControlStore) -> DataPlane:
        plane = open_plane(spec, store)
        if spec.side == self._side and not self._has_one:
            self._has_one = True
            abort = plane.abort

            def cling() -> None:
                abort()
                self._abort()

            plane.abort = cling  # type: ignore[method-assign]
        return plane


@pytest.fixture
def may_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set: aborts that hang may end."""
    monkeypatch.setattr(channel, "MAX_ABORT_S", MAX_ABORT_S)
    monkeypatch.setattr(PlaneSpec, "longest_s", 0.0)  # that others may have something under way
    event = threading.Event()
    yield event
    event.set()


def give_up() -> None:
    raise RuntimeError("NCCL: the abort took too long")


def used_memory(pair: Pair, side: Side) -> set[int]:
    """Sends as many pieces as there are credits; the addresses of their slots on one side."""
    found = set()
    while (slot := pair.prefill.endpoint.acquire_slot(DECODE)) is not None:
        pair.send_in(slot, piece("r"), fill=1)
        received = pair.decode.next_of(PieceReceived)
        found.add((slot.tensor if side == "prefill" else received.data).data_ptr())
    return found


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_channel_reopens_in_other_memory_than_the_lost_one_holds(
    how: str, side: Side, may_end: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = lambda: assert_set(may_end)  # noqa: E731
    monkeypatch.setattr(opening, "open_plane", Clinging(side, give_up if how == "raises" else hang))
    pair = Pair()
    try:
        ours = pair.prefill if side == "prefill" else pair.decode
        before = used_memory(pair, side)
        pair.decode.endpoint.peer_down(PREFILL)
        pair.prefill.next_of(ChannelLost)
        pair.prefill.next_of(ChannelOpened)
        pair.decode.next_of(ChannelOpened)
        quarantined = ours.endpoint.status().staging_quarantined_bytes
        assert quarantined > 0 and ours.endpoint.status().staging_lent_bytes > 0
        assert used_memory(pair, side).isdisjoint(before)
        may_end.set()
        pair.prefill.endpoint.peer_down(DECODE)
        wait_until(lambda: ours.endpoint.status().staging_lent_bytes == 0)
        assert ours.endpoint.status().staging_quarantined_bytes == quarantined
        assert ours.endpoint.may_use_device
    finally:
        may_end.set()
        pair.close()


def assert_set(event: threading.Event) -> None:
    assert event.wait(60.0)


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_abort_that_hangs_does_not_keep_an_endpoint_from_closing(
    side: Side, may_end: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(channel, "MAX_ABORT_S", 60.0)
    monkeypatch.setattr(endpoint, "CLOSE_WAIT_S", 0.3)
    monkeypatch.setattr(opening, "open_plane", Clinging(side, lambda: assert_set(may_end)))
    pair, began_s = Pair(), time.monotonic()
    pair.close()
    assert time.monotonic() - began_s < 5.0
    assert "left to the end of the process after 0.3 s: phloem-transfer-" in caplog.text
    may_end.set()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("phloem-transfer")])

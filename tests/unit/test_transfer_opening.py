"""Channels whose opening hangs, as NCCL's first calls do when the peer stops just then."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.session import PeerRef
from phloem.shared.transfer import opening
from phloem.shared.transfer.errors import channel_lost
from phloem.shared.transfer.events import ChannelOpened, PieceReceived
from phloem.shared.transfer.frames import FrameSocket
from phloem.shared.transfer.opening import MAX_STUCK_PER_PEER, Opening, StuckOpenings
from phloem.shared.transfer.pending import MovedNow
from phloem.shared.transfer.planes import DataPlane, PlaneSpec
from phloem.shared.transfer.rendezvous import ControlStore
from tests.support.transfer import DECODE, HOST, PREFILL, Recorded, piece, wait_until
from tests.support.transfer_opening import Hangs, both_ends, open_threads

TIMEOUT_S = 0.3
SOON_S = 2.0  # that, and what cleaning up may take


@pytest.fixture
def hangs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hangs]:
    hangs = Hangs(monkeypatch)
    yield hangs
    hangs.end()


@pytest.fixture
def store() -> Iterator[ControlStore]:
    with socket.create_server((HOST, 0)) as server:
        frames = FrameSocket(socket.create_connection(server.getsockname(), 5.0))
        yield ControlStore(frames, 5.0)
        frames.close()


def begin(store: ControlStore, timeout_s: float = TIMEOUT_S) -> Opening:
    return Opening(PlaneSpec(HOST, "prefill", "cpu", 60.0, opening_timeout_s=timeout_s), store, "x")


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(PhloemError) as caught:
        call()
    return caught.value.code


# -- by itself -----------------------------------------------------------------------------------------


def test_rank_that_never_joins_is_given_up_and_its_late_plane_aborted(
    hangs: Hangs, store: ControlStore
) -> None:
    hanging, began_s = hangs(1), time.monotonic()
    made = begin(store)
    assert code_of(made.plane) == "transfer_timeout"
    assert not made.clean_up() and not made.is_over
    assert time.monotonic() - began_s < SOON_S
    hanging.may_go_on.set()
    wait_until(lambda: made.is_over)
    assert hanging.planes[0].is_aborted.is_set()


def test_first_byte_that_never_goes_through_is_given_up_and_its_plane_aborted(
    hangs: Hangs, store: ControlStore
) -> None:
    hanging, began_s = hangs(1), time.monotonic()
    hanging.may_go_on.set()
    made = begin(store)
    assert code_of(made.plane) == "transfer_timeout"
    assert made.clean_up() and made.is_over
    assert hanging.planes[0].is_aborted.is_set()
    assert time.monotonic() - began_s < SOON_S


def test_who_waits_is_told_at_once_that_the_channel_has_failed(hangs: Hangs, store: ControlStore) -> None:
    hangs(1)
    made, began_s = begin(store, timeout_s=60.0), time.monotonic()
    failing = threading.Timer(0.05, made.give_up, [ErrorInfo("peer_gone", "it left", True, 503)])
    failing.start()
    assert code_of(made.plane) == "peer_gone"
    assert time.monotonic() - began_s < SOON_S
    failing.join()


def test_what_the_opening_fails_with_is_told(monkeypatch: pytest.MonkeyPatch, store: ControlStore) -> None:
    def fail(error: Exception) -> Callable[[PlaneSpec, ControlStore], DataPlane]:
        def open_plane(spec: PlaneSpec, store: ControlStore) -> DataPlane:
            raise error

        return open_plane

    for error, code in ((channel_lost("no group"), "channel_lost"), (ValueError("bug"), "channel_lost")):
        monkeypatch.setattr(opening, "open_plane", fail(error))
        made = begin(store)
        assert code_of(made.plane) == code
        assert made.clean_up()


def test_thread_that_opens_has_the_planes_device(
    monkeypatch: pytest.MonkeyPatch, store: ControlStore
) -> None:
    """NCCL goes back to the device that it found, which would be the first one."""
    seen: list[tuple[str, object]] = []

    def open_plane(spec: PlaneSpec, store: ControlStore) -> DataPlane:
        seen.append((threading.current_thread().name, "opens"))
        raise channel_lost("enough")

    def set_device(device: object) -> None:
        seen.append((threading.current_thread().name, device))

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(opening, "open_plane", open_plane)
    for device in ("cuda:1", "cpu"):
        made = Opening(PlaneSpec(HOST, "prefill", device, 60.0), store, "x")
        assert code_of(made.plane) == "channel_lost" and made.clean_up()
    thread = "phloem-transfer-open-x"
    assert seen == [(thread, torch.device("cuda:1")), (thread, "opens"), (thread, "opens")]


def test_stuck_openings_are_counted_until_they_end(hangs: Hangs, store: ControlStore) -> None:
    hanging, stuck = hangs(MAX_STUCK_PER_PEER), StuckOpenings()
    for _ in range(MAX_STUCK_PER_PEER):
        stuck.check(DECODE)
        made = begin(store, timeout_s=0.01)
        assert code_of(made.plane) == "transfer_timeout"
        stuck.add(DECODE, made)
    assert code_of(lambda: stuck.check(DECODE)) == "overloaded"
    stuck.check(PeerRef(DECODE.worker_id, DECODE.epoch + 1))
    hanging.may_go_on.set()
    wait_until(lambda: stuck.count(DECODE) == 0)
    stuck.check(DECODE)


# -- in an endpoint ------------------------------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[tuple[Recorded, Recorded]]:
    """Prefill's and decode's."""
    with both_ends(TIMEOUT_S, TIMEOUT_S) as made:
        yield made


def test_channel_opens_after_openings_that_hang_for_ever(
    hangs: Hangs, ends: tuple[Recorded, Recorded]
) -> None:
    hanging, (prefill, decode) = hangs(2), ends  # of either side one, or both of a side
    prefill.endpoint.peer_up(DECODE, decode.endpoint.address)
    prefill.next(ChannelOpened, 15.0)
    decode.next(ChannelOpened)
    assert len(open_threads()) == 2, "those that hang have neither been waited for nor forgotten"
    slot = prefill.endpoint.acquire_slot(DECODE)
    assert slot is not None
    prefill.endpoint.send_piece(DECODE, piece("r"), slot, MovedNow(0))
    assert decode.next(PieceReceived).header.request_id == "r"
    assert prefill.endpoint.status().staging_quarantined_bytes == 0
    assert hanging.num_calls >= 4


def test_peer_with_which_too_many_openings_hang_is_not_dialed_again(
    hangs: Hangs, ends: tuple[Recorded, Recorded]
) -> None:
    hanging, (prefill, decode) = hangs(1000), ends
    prefill.endpoint.peer_up(DECODE, decode.endpoint.address)

    def is_refused() -> bool:
        error = prefill.endpoint.status().cut_off.get(DECODE.worker_id)
        return error is not None and error.code == "overloaded" and "hang in the middle" in error.message

    wait_until(is_refused, 30.0)
    assert hanging.num_calls <= 2 * MAX_STUCK_PER_PEER
    prefill.assert_silent()


@pytest.mark.parametrize("how", ["close", "peer_down"])
def test_opening_that_hangs_holds_up_neither_the_end_of_an_endpoint_nor_of_a_peer(
    hangs: Hangs, how: str
) -> None:
    hanging, began_s = hangs(2), time.monotonic()
    with both_ends(60.0, 60.0) as (prefill, decode):
        prefill.endpoint.peer_up(DECODE, decode.endpoint.address)
        wait_until(lambda: hanging.num_calls == 2)  # both sides
        assert prefill.endpoint.may_use_device and decode.endpoint.may_use_device
        assert prefill.endpoint.status().num_channels == 0, "none is open"
        if how == "peer_down":
            prefill.endpoint.peer_down(DECODE)
            decode.endpoint.peer_down(PREFILL)
            wait_until(lambda: prefill.endpoint.status().staging_lent_bytes == 0)
            wait_until(lambda: decode.endpoint.status().staging_lent_bytes == 0)
            assert prefill.endpoint.may_use_device, "a thread of it hangs in NCCL"
    assert time.monotonic() - began_s < 10.0
    prefill.assert_silent()

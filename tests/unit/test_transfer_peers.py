"""More peers than there is staging memory for; peers that come and go; peers that nobody can reach."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import msgspec
import pytest

from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.session import PeerRef
from phloem.shared.transfer import redial
from phloem.shared.transfer.events import ChannelLost, ChannelOpened, PieceReceived
from phloem.shared.transfer.frames import FrameSocket
from phloem.shared.transfer.handshake import handshake_deadline, prove_as_listener, transfer_key
from phloem.shared.transfer.pending import MovedNow
from phloem.shared.transfer.staging import StagingSlot
from tests.support.transfer import HOST, SECRET, SLOT_BYTES, Recorded, piece, transfer_config, wait_until

NUM_JOINS = 25


class Peers:
    """Endpoints by name; every one is closed at the end."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def start(self, name: str, *, max_peers: int = 8, slots: int = 1) -> Recorded:
        config = transfer_config(PeerRef(name, 1), accepts=name.startswith("d"))
        config = msgspec.structs.replace(config, max_peers=max_peers, staging_slots=slots)
        recorded = Recorded(config)
        self._stack.callback(recorded.endpoint.close, 0.0)
        return recorded


@pytest.fixture
def peers() -> Iterator[Peers]:
    with ExitStack() as stack:
        yield Peers(stack)


def ref(name: str) -> PeerRef:
    return PeerRef(name, 1)


def dial(prefill: Recorded, decode: Recorded, name: str) -> None:
    prefill.endpoint.peer_up(ref(name), decode.endpoint.address)


def open_channel(prefill: Recorded, decode: Recorded, name: str) -> None:
    dial(prefill, decode, name)
    prefill.next_of(ChannelOpened)
    decode.next_of(ChannelOpened)


def cut_off(prefill: Recorded, name: str) -> ErrorInfo:
    """Why there is no channel with this peer, once it counts as cut off."""
    wait_until(lambda: name in prefill.endpoint.status().cut_off)
    return prefill.endpoint.status().cut_off[name]


def send(prefill: Recorded, name: str, fill: int) -> StagingSlot | None:
    """One piece; None when the channel has no slot or no credit."""
    slot = prefill.endpoint.acquire_slot(ref(name))
    if slot is not None:
        slot.tensor.fill_(fill)
        prefill.endpoint.send_piece(ref(name), piece("r", fill), slot, MovedNow(fill))
    return slot


def test_decode_side_without_memory_refuses_and_takes_the_peer_when_another_leaves(
    peers: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)  # not lower: a kept record of a channel's end keeps the channel
    decode = peers.start("d", max_peers=2)
    first, second, third = (peers.start(name) for name in ("p1", "p2", "p3"))
    open_channel(first, decode, "d")
    open_channel(second, decode, "d")
    dial(third, decode, "d")
    error = cut_off(third, "d")
    assert (error.code, error.retryable) == ("staging_full", True)
    assert "d has staging memory for 2 peers" in error.message and "--transfer-peers" in error.message
    said = [record.getMessage() for record in caplog.records if "--transfer-peers" in record.getMessage()]
    assert any(text.startswith("p3 (epoch 1) is refused a transfer channel") for text in said)
    assert any("no KV channel with d (epoch 1), requests go elsewhere, next try in 1 s" in t for t in said)
    first.endpoint.peer_down(ref("d"))
    third.next_of(ChannelOpened, 10.0)
    assert third.endpoint.status().cut_off == {}
    assert send(third, "d", 1) and decode.next_of(PieceReceived).peer == ref("p3")


def test_prefill_side_without_memory_tells_both_sides_and_dials_when_a_peer_leaves(
    peers: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    prefill = peers.start("p", max_peers=1)
    one, two = peers.start("d1"), peers.start("d2")
    open_channel(prefill, one, "d1")
    dial(prefill, two, "d2")
    assert cut_off(prefill, "d2").code == "staging_full"
    full = "p has staging memory for 1 peer, and 1 channel has it"
    wait_until(lambda: f"a transfer connection from 127.0.0.1 is refused: {full}" in caplog.text)
    ours = [r.getMessage() for r in caplog.records if "dialer" in r.name and full in r.getMessage()]
    tries = [f"no KV channel with d2 (epoch 1), requests go elsewhere, next try in {n} s" for n in (1, 2, 4)]
    assert ours and all(text.startswith(begins) for text, begins in zip(ours, tries, strict=False))
    prefill.endpoint.peer_down(ref("d1"))
    prefill.next_of(ChannelOpened)
    two.next_of(ChannelOpened)
    assert prefill.endpoint.status().num_channels == two.endpoint.status().num_channels == 1


def test_side_takes_no_more_peers_than_it_said_though_the_first_ones_need_few_slots(peers: Peers) -> None:
    """What they leave of the staging memory is no room: NCCL needs memory for each channel."""
    prefill = peers.start("p", max_peers=1, slots=4)
    one, two = peers.start("d1"), peers.start("d2")
    open_channel(prefill, one, "d1")
    assert prefill.endpoint.status().staging_lent_bytes == SLOT_BYTES, "of four"
    dial(prefill, two, "d2")
    error = cut_off(prefill, "d2")
    assert (error.code, error.retryable) == ("staging_full", True)
    assert prefill.endpoint.status().num_channels == 1 and two.endpoint.status().num_channels == 0
    assert send(prefill, "d1", 1) and one.next_of(PieceReceived).peer == ref("p")


def test_peer_that_restarts_takes_its_own_place(peers: Peers) -> None:
    prefill, decode = peers.start("p", max_peers=1, slots=4), peers.start("d")
    open_channel(prefill, decode, "d")
    again = Recorded(transfer_config(PeerRef("d", 2), accepts=True))
    try:
        prefill.endpoint.peer_up(PeerRef("d", 2), again.endpoint.address)
        prefill.next_of(ChannelOpened)
        again.next_of(ChannelOpened)
        assert prefill.endpoint.status().cut_off == {}
    finally:
        again.endpoint.close(0.0)


def test_side_without_memory_knows_the_reason_though_the_peer_has_left_meanwhile(peers: Peers) -> None:
    prefill, one = peers.start("p", max_peers=1), peers.start("d1")
    open_channel(prefill, one, "d1")
    with socket.create_server((HOST, 0)) as server:
        prefill.endpoint.peer_up(ref("d2"), f"{HOST}:{server.getsockname()[1]}")
        sock, _ = server.accept()
        prove_as_listener(FrameSocket(sock), transfer_key(SECRET), handshake_deadline(3.0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()  # with a reset: nothing can be written to it
        assert cut_off(prefill, "d2").code == "staging_full"


def test_channels_whose_slots_are_all_lent_hold_up_nobody_else(peers: Peers) -> None:
    """One decode worker's engine reads nothing; the others' pieces come through for as long as they like."""
    prefill = peers.start("p", max_peers=3, slots=2)
    decodes = {name: peers.start(name, slots=2) for name in ("d1", "d2", "d3")}
    for name, decode in decodes.items():
        open_channel(prefill, decode, name)
    while send(prefill, "d1", 1) is not None:
        pass
    stuck = [decodes["d1"].next_of(PieceReceived), decodes["d1"].next_of(PieceReceived)]
    for fill in range(20):
        for name in ("d2", "d3"):
            wait_until(lambda n=name, f=fill: send(prefill, n, f))  # type: ignore[misc]
            received = decodes[name].next_of(PieceReceived)
            assert int(received.data[0]) == fill
            decodes[name].endpoint.release(received)
    assert prefill.endpoint.acquire_slot(ref("d1")) is None
    for received in stuck:
        decodes["d1"].endpoint.release(received)
    wait_until(lambda: send(prefill, "d1", 2))


def test_memory_of_every_peer_comes_back_when_it_leaves(peers: Peers) -> None:
    """Decode workers that join, take a piece, and leave; one stays, and is served all the while."""
    prefill = peers.start("p", max_peers=2, slots=2)
    stays = peers.start("d-stays", slots=2)
    assert [each.endpoint.may_use_device for each in (prefill, stays)] == [False, False]
    open_channel(prefill, stays, "d-stays")
    assert [each.endpoint.may_use_device for each in (prefill, stays)] == [True, True]
    held = prefill.endpoint.status().staging_lent_bytes
    assert held == 2 * SLOT_BYTES
    for n in range(NUM_JOINS):
        name = f"d{n}"
        joins = peers.start(name, slots=2)
        open_channel(prefill, joins, name)
        assert prefill.endpoint.status().staging_lent_bytes == held + SLOT_BYTES
        assert send(prefill, name, 3) is not None
        assert int(joins.next_of(PieceReceived).data[0]) == 3
        assert send(prefill, "d-stays", 4) is not None
        stays.endpoint.release(stays.next_of(PieceReceived))
        joins.endpoint.close(0.0)
        assert prefill.next_of(ChannelLost).peer == ref(name)
        prefill.endpoint.peer_down(ref(name))
        wait_until(lambda: prefill.endpoint.status().staging_lent_bytes == held)
        assert joins.endpoint.status().staging_lent_bytes == 0
    assert stays.endpoint.status().num_channels == prefill.endpoint.status().num_channels == 1


def test_peer_that_does_not_answer_is_cut_off_until_it_does(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redial, "CUT_OFF_AFTER_S", 0.2)
    with socket.create_server((HOST, 0)) as placeholder:
        port = placeholder.getsockname()[1]
    prefill = peers.start("p")
    prefill.endpoint.peer_up(ref("d"), f"{HOST}:{port}")
    assert cut_off(prefill, "d").code == "channel_lost"
    prefill.endpoint.peer_down(ref("d"))
    assert prefill.endpoint.status().cut_off == {}

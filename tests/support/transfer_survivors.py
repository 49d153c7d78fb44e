"""Peers that stop or die while a channel opens or receives, beside one that lives: on CPUs and on GPUs."""

from __future__ import annotations

import functools
import signal
import time
from contextlib import ExitStack

import msgspec
import psutil

from phloem.shared.protocol.session import PeerRef
from phloem.shared.transfer.config import OPENING_TIMEOUT_S, TransferConfig
from phloem.shared.transfer.events import ChannelLost, ChannelOpened, PieceReceived
from phloem.shared.transfer.pending import MovedNow
from tests.support.transfer import Recorded, piece, transfer_config, wait_until
from tests.support.transfer_child import Child, decode_child, prefill_child

SLOT_BYTES = 64 * 1024
US, STOPS, LIVES = PeerRef("us", 1), PeerRef("stops", 1), PeerRef("lives", 1)
START_S = 60.0  # of a process that imports torch


def config(
    me: PeerRef, device: str, timeout_s: float, *, accepts: bool, opening_timeout_s: float = OPENING_TIMEOUT_S
) -> TransferConfig:
    made = transfer_config(
        me,
        accepts=accepts,
        staging_bytes=SLOT_BYTES,
        timeout_s=timeout_s,
        opening_timeout_s=opening_timeout_s,
    )
    return msgspec.structs.replace(made, device=device, max_peers=4)


def hasty(me: PeerRef, device: str, timeout_s: float, *, accepts: bool) -> TransferConfig:
    """An opening gets no longer than any other operation."""
    return config(me, device, timeout_s, accepts=accepts, opening_timeout_s=timeout_s)


def survive_stopped_decode(ours: str, theirs: str, after_s: float, timeout_s: float) -> None:
    """`ours` and `theirs` are devices; `after_s`: from when the peer has begun to open."""
    stopping = decode_child(hasty(STOPS, theirs, timeout_s, accepts=True), after_s)
    living = decode_child(hasty(LIVES, theirs, timeout_s, accepts=True))
    with stopping as (stopped, stopped_address), living as (lives, address):
        prefill = Recorded(hasty(US, ours, timeout_s, accepts=False))
        prefill.endpoint.peer_up(STOPS, stopped_address)
        wait_until(functools.partial(_is_stopped, stopped), START_S)
        stopped_s = time.monotonic()
        prefill.endpoint.peer_up(LIVES, address)
        wait_until(lambda: prefill.endpoint.is_open(LIVES, "prefill"), START_S)
        _send(prefill, lives, 1)
        _assert_given_up(prefill, stopped_s, timeout_s)
        _send(prefill, lives, 2)
        _close(prefill)


def survive_stopped_prefill(ours: str, theirs: str, after_s: float, timeout_s: float) -> None:
    decode = Recorded(hasty(US, ours, timeout_s, accepts=True))
    address = decode.endpoint.address
    stopping = prefill_child(hasty(STOPS, theirs, timeout_s, accepts=False), US, address, after_s)
    with stopping as stopped:
        wait_until(functools.partial(_is_stopped, stopped), START_S)
        stopped_s = time.monotonic()
        with prefill_child(hasty(LIVES, theirs, timeout_s, accepts=False), US, address) as lives:
            while decode.next_of(ChannelOpened, START_S).peer != LIVES:
                pass
            for fill in (1, 2):
                lives.pipe.send(fill)
                received = decode.next_of(PieceReceived, 10.0)
                if received.incoming is not None:
                    received.incoming.wait(10.0)
                assert int(received.data.sum()) == fill * received.header.num_bytes
                decode.endpoint.release(received)
                _assert_given_up(decode, stopped_s, timeout_s)
            _close(decode)


def survive_killed_beside_hanging(ours: str, theirs: str, timeout_s: float) -> None:
    """Of three prefill peers one hangs and one dies, with a receive posted here for bytes that never leave;
    the third one sends all the while."""
    decode = Recorded(config(US, ours, timeout_s, accepts=True))
    dies = PeerRef("dies", 1)
    with ExitStack() as stack:
        peers = {
            peer: stack.enter_context(
                prefill_child(config(peer, theirs, timeout_s, accepts=False), US, decode.endpoint.address)
            )
            for peer in (STOPS, dies, LIVES)
        }
        opened = {decode.next_of(ChannelOpened, START_S).peer for _ in peers}
        assert opened == set(peers)
        lost: dict[PeerRef, float] = {}
        peers[LIVES].pipe.send(1)
        _next_piece_of_living(decode, lost, 10.0)  # CUDA loads a kernel when all others have ended
        peers[STOPS].pipe.send(-signal.SIGSTOP)
        wait_until(functools.partial(_is_stopped, peers[STOPS]), 5.0)
        began_s = time.monotonic()
        peers[dies].pipe.send(-signal.SIGKILL)
        times_s: list[float] = []
        while len(lost) < 2:
            fill = len(times_s) % 200 + 1
            sent_s = time.monotonic()
            peers[LIVES].pipe.send(fill)
            assert _next_piece_of_living(decode, lost, 0.5) == fill
            times_s.append(time.monotonic() - sent_s)
        assert len(times_s) > 3 and max(times_s) < 0.5
        assert lost[dies] - began_s < 3.0 and lost[STOPS] - began_s < timeout_s + 3.0
        _assert_given_up(decode, began_s, timeout_s)
        _close(decode)


def _next_piece_of_living(decode: Recorded, lost: dict[PeerRef, float], within_s: float) -> float:
    """The mean of its bytes; who is lost meanwhile is noted, with the time."""
    deadline = time.monotonic() + within_s
    while True:
        event = decode.next_of(object, deadline - time.monotonic())
        if isinstance(event, ChannelLost):
            lost[event.peer] = time.monotonic()
        elif isinstance(event, PieceReceived) and event.peer == LIVES:
            if event.incoming is not None:
                event.incoming.wait(1.0)
            mean = int(event.data.sum()) / event.header.num_bytes
            decode.endpoint.release(event)
            return mean


def _is_stopped(child: Child) -> bool:
    return child.process.status() == psutil.STATUS_STOPPED


def _send(prefill: Recorded, decode: Child, fill: int) -> None:
    slot = prefill.endpoint.acquire_slot(LIVES)
    assert slot is not None
    slot.tensor.fill_(fill)
    assert int(slot.tensor[0]) == fill  # a device has done it
    num_bytes = slot.tensor.numel()
    prefill.endpoint.send_piece(LIVES, piece("r", 0, num_bytes), slot, MovedNow(0))
    assert decode.read() == (0, fill, fill * num_bytes)


def _assert_given_up(ours: Recorded, stopped_s: float, timeout_s: float) -> None:
    """Memory is with the channel of the peer that lives alone, within a step of the opening."""

    def is_given_up() -> bool:
        status = ours.endpoint.status()
        return status.num_channels == 1 and status.staging_lent_bytes <= 3 * SLOT_BYTES

    wait_until(is_given_up, START_S)
    assert time.monotonic() - stopped_s < 2 * timeout_s + 5.0
    assert ours.endpoint.status().staging_quarantined_bytes == 0


def _close(ours: Recorded) -> None:
    began_s = time.monotonic()
    ours.endpoint.close(0.0)
    assert time.monotonic() - began_s < 4.0, "it does not wait for who hangs"

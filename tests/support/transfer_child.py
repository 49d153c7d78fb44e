"""One side of a channel in a process of its own, which a test may stop or kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext

import psutil

from phloem.shared.protocol.session import PeerRef
from phloem.shared.transfer import opening
from phloem.shared.transfer.config import TransferConfig
from phloem.shared.transfer.events import ChannelOpened, PieceReceived, SlotAvailable
from phloem.shared.transfer.pending import MovedNow
from phloem.shared.transfer.planes import DataPlane, PlaneSpec, open_plane
from phloem.shared.transfer.rendezvous import ControlStore
from phloem.shared.transfer.staging import StagingSlot
from tests.support.transfer import Recorded, piece


def context() -> ForkServerContext:
    """Children fork from a server that has imported torch and started nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["phloem.shared.transfer.endpoint", "tests.support.transfer_child"])
    return context


def stop_when_opening(after_s: float) -> None:
    """This process gets a SIGSTOP so long after it has begun to join a channel's plane."""

    def open_and_stop(spec: PlaneSpec, store: ControlStore) -> DataPlane:
        threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        return open_plane(spec, store)

    vars(opening)["open_plane"] = open_and_stop


def run_decode(config: TransferConfig, pipe: Connection, stops_after_s: float | None = None) -> None:
    """Releases every piece, and reports its first byte and the sum of its bytes."""
    if stops_after_s is not None:
        stop_when_opening(stops_after_s)
    recorded = Recorded(config)
    pipe.send(recorded.endpoint.address)
    while True:
        received = recorded.next_of(PieceReceived, 60.0)
        if received.incoming is not None:
            received.incoming.wait(10.0)
        pipe.send((received.header.page_start, int(received.data[0]), int(received.data.sum())))
        recorded.endpoint.release(received)


def run_prefill(
    config: TransferConfig,
    pipe: Connection,
    peer: PeerRef,
    address: str,
    stops_after_s: float | None = None,
) -> None:
    """Dials, then sends one piece of page 0 whenever it is told a number to fill it with; told a signal's
    number less than zero, it announces a piece, of which no byte follows: it gets the signal."""
    if stops_after_s is not None:
        stop_when_opening(stops_after_s)
    recorded = Recorded(config)
    recorded.endpoint.peer_up(peer, address)
    recorded.next_of(ChannelOpened, 60.0)
    while True:
        fill: int = pipe.recv()
        slot = _acquire(recorded, peer)
        if fill < 0:
            recorded.endpoint.announce(peer, [piece("r", 0, slot.tensor.numel())], [slot])
            os.kill(os.getpid(), -fill)
        slot.tensor.fill_(fill)
        assert int(slot.tensor[0]) == fill  # a device has done it
        recorded.endpoint.send_piece(peer, piece("r", 0, slot.tensor.numel()), slot, MovedNow(0))


def _acquire(recorded: Recorded, peer: PeerRef) -> StagingSlot:
    """As an engine does: word of the next piece may come before the slots of the last ones, or their credits,
    are back."""
    while (slot := recorded.endpoint.acquire_slot(peer)) is None:
        recorded.next_of(SlotAvailable, 10.0)
    return slot


class Child:
    """A running side: its pipe, and its process."""

    def __init__(self, pid: int, pipe: Connection) -> None:
        self.process = psutil.Process(pid)
        self.pipe = pipe

    def read(self) -> object:
        assert self.pipe.poll(30.0), "the child said nothing"
        return self.pipe.recv()


@contextmanager
def decode_child(config: TransferConfig, stops_after_s: float | None = None) -> Iterator[tuple[Child, str]]:
    """A decode side and its address."""
    ours, theirs = multiprocessing.Pipe()
    process = context().Process(target=run_decode, args=(config, theirs, stops_after_s), daemon=True)
    with _running(process, ours) as child:
        yield child, str(child.read())


@contextmanager
def prefill_child(
    config: TransferConfig, peer: PeerRef, address: str, stops_after_s: float | None = None
) -> Iterator[Child]:
    ours, theirs = multiprocessing.Pipe()
    arguments = (config, theirs, peer, address, stops_after_s)
    process = context().Process(target=run_prefill, args=arguments, daemon=True)
    with _running(process, ours) as child:
        yield child


@contextmanager
def _running(process: multiprocessing.process.BaseProcess, pipe: Connection) -> Iterator[Child]:
    process.start()
    try:
        assert process.pid is not None
        yield Child(process.pid, pipe)
    finally:
        process.kill()
        process.join()
        process.close()
        pipe.close()

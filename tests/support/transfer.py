"""Endpoints that remember their events, and peers that break the rules."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from phloem.shared.errors import PhloemError
from phloem.shared.host_port import split_host_port
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Open, Opened, Piece, Refused, TransferMessage, transfer_message
from phloem.shared.transfer.config import OPENING_TIMEOUT_S, TransferConfig
from phloem.shared.transfer.endpoint import TransferEndpoint
from phloem.shared.transfer.events import ChannelOpened, Side, TransferEvent
from phloem.shared.transfer.frames import FrameSocket
from phloem.shared.transfer.handshake import (
    handshake_deadline,
    prove_as_dialer,
    prove_as_listener,
    transfer_key,
)
from phloem.shared.transfer.pending import MovedNow
from phloem.shared.transfer.planes import DataPlane, PlaneSpec, open_plane
from phloem.shared.transfer.rendezvous import ControlStore
from phloem.shared.transfer.staging import StagingSlot

HOST = "127.0.0.1"
SECRET = b"the cluster's secret"
LAYOUT = "llama/float32/16"
PREFILL = PeerRef("prefill-a", 3)
DECODE = PeerRef("decode-a", 7)
SLOT_BYTES = 64 * 1024
NUM_SLOTS = 3

Event = TypeVar("Event")


def transfer_config(
    me: PeerRef,
    *,
    accepts: bool = False,
    secret: bytes = SECRET,
    layout: str = LAYOUT,
    staging_bytes: int = SLOT_BYTES,
    timeout_s: float = 10.0,
    opening_timeout_s: float = OPENING_TIMEOUT_S,
) -> TransferConfig:
    return TransferConfig(
        me=me,
        host=HOST,
        cluster_secret=secret,
        kv_layout=layout,
        staging_bytes=staging_bytes,
        staging_slots=NUM_SLOTS,
        timeout_s=timeout_s,
        opening_timeout_s=opening_timeout_s,
        accepts=accepts,
    )


def make_slots(num_slots: int, num_bytes: int) -> list[StagingSlot]:
    """Slots of a channel "c"."""
    return [StagingSlot(n, "c", torch.empty(num_bytes, dtype=torch.uint8)) for n in range(num_slots)]


class Recorded:
    """An endpoint and its events, in order."""

    def __init__(self, config: TransferConfig) -> None:
        self._events: SimpleQueue[TransferEvent] = SimpleQueue()
        self.endpoint = TransferEndpoint(config, self._events.put)

    def next(self, event_type: type[Event], timeout_s: float = 5.0) -> Event:
        """The next event, which must be of this type."""
        event = self._events.get(timeout=timeout_s)
        assert isinstance(event, event_type), event
        return event

    def next_of(self, event_type: type[Event], timeout_s: float = 5.0) -> Event:
        """The next event of this type; those before it are dropped."""
        deadline = time.monotonic() + timeout_s
        while True:
            event = self._events.get(timeout=max(deadline - time.monotonic(), 0.001))
            if isinstance(event, event_type):
                return event

    def assert_silent(self, for_s: float = 0.0) -> None:
        try:
            event = self._events.get(timeout=for_s) if for_s else self._events.get_nowait()
        except Empty:
            return
        raise AssertionError(f"unexpected {event}")


@contextmanager
def one_end(config: TransferConfig) -> Iterator[Recorded]:
    recorded = Recorded(config)
    try:
        yield recorded
    finally:
        recorded.endpoint.close(0.0)


class Pair:
    """A prefill and a decode endpoint in one process, joined."""

    def __init__(self, *, timeout_s: float = 10.0, staging_bytes: int = SLOT_BYTES) -> None:
        self.decode = Recorded(
            transfer_config(DECODE, accepts=True, timeout_s=timeout_s, staging_bytes=staging_bytes)
        )
        self.prefill = Recorded(transfer_config(PREFILL, timeout_s=timeout_s, staging_bytes=staging_bytes))
        self.prefill.endpoint.peer_up(DECODE, self.decode.endpoint.address)
        self.prefill.next(ChannelOpened)
        self.decode.next(ChannelOpened)

    def send(self, header: Piece, fill: int) -> bool:
        """Sends a piece of equal bytes; False when there is no slot."""
        slot = self.prefill.endpoint.acquire_slot(DECODE)
        if slot is None:
            return False
        self.send_in(slot, header, fill)
        return True

    def send_in(self, slot: StagingSlot, header: Piece, fill: int) -> None:
        slot.tensor[: header.num_bytes] = fill
        self.prefill.endpoint.send_piece(DECODE, header, slot, MovedNow(header.digest))

    def close(self) -> None:
        self.prefill.endpoint.close(0.0)
        self.decode.endpoint.close(0.0)


@contextmanager
def joined(*, timeout_s: float = 10.0, staging_bytes: int = SLOT_BYTES) -> Iterator[Pair]:
    pair = Pair(timeout_s=timeout_s, staging_bytes=staging_bytes)
    try:
        yield pair
    finally:
        pair.close()


def piece(request_id: str, page: int = 0, num_bytes: int = 4096) -> Piece:
    return Piece(request_id, 1, page, 1, 0, 1, num_bytes, digest=page)


def wait_until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Returns once `condition()` is true; raises TimeoutError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.005)


class RoguePeer:
    """A hand-driven side of a channel that knows the secret and may break every other rule."""

    def __init__(self, sock: socket.socket) -> None:
        self.frames = FrameSocket(sock)
        self.frames.set_timeout(5.0)
        self.plane: DataPlane | None = None

    def write(self, message: TransferMessage) -> None:
        self.frames.write(transfer_message.encode(message))

    def read(self) -> TransferMessage:
        return transfer_message.decode(self.frames.read(1 << 20))

    def close(self) -> None:
        if self.plane is not None:
            self.plane.abort()
            self.plane = None
        self.frames.shutdown()
        self.frames.close()


def dial_open(address: str, request: Open, secret: bytes = SECRET) -> tuple[RoguePeer, Opened | Refused]:
    """Connects, proves itself, sends `request`; returns the answer too."""
    rogue = RoguePeer(socket.create_connection(split_host_port(address), 5.0))
    try:
        prove_as_dialer(rogue.frames, transfer_key(secret), handshake_deadline(3.0))
    except PhloemError:
        rogue.close()
        raise
    rogue.write(request)
    answer = rogue.read()
    assert isinstance(answer, Opened | Refused)
    return rogue, answer


def open_request(**changes: object) -> Open:
    fields: dict[str, object] = {
        "prefill": PREFILL,
        "decode": DECODE,
        "kv_layout": LAYOUT,
        "staging_bytes": SLOT_BYTES,
        "channel_name": "rogue-1",
    }
    return Open(**(fields | changes))  # type: ignore[arg-type]  # tests vary one field each


@contextmanager
def rogue_prefill(decode: Recorded, timeout_s: float = 5.0) -> Iterator[RoguePeer]:
    """A prefill side whose channel has just opened."""
    rogue, answer = dial_open(decode.endpoint.address, open_request())
    try:
        assert isinstance(answer, Opened)
        rogue.plane = _join("prefill", rogue.frames, timeout_s)
        rogue.plane.post_send(torch.ones(1, dtype=torch.uint8)).wait(timeout_s)
        decode.next(ChannelOpened)
        yield rogue
    finally:
        rogue.close()


@contextmanager
def accept_open(prefill: Recorded) -> Iterator[RoguePeer]:
    """A decode side that has just been asked to open."""
    with socket.create_server((HOST, 0)) as server:
        prefill.endpoint.peer_up(DECODE, f"{HOST}:{server.getsockname()[1]}")
        sock, _ = server.accept()
    rogue = RoguePeer(sock)
    try:
        prove_as_listener(rogue.frames, transfer_key(SECRET), handshake_deadline(3.0))
        request = rogue.read()
        assert isinstance(request, Open)
        yield rogue
    finally:
        rogue.close()


@contextmanager
def rogue_decode(prefill: Recorded, timeout_s: float = 5.0) -> Iterator[RoguePeer]:
    """A decode side whose channel has just opened, with `NUM_SLOTS` credits."""
    with accept_open(prefill) as rogue:
        rogue.write(Opened(SLOT_BYTES, NUM_SLOTS))
        rogue.plane = _join("decode", rogue.frames, timeout_s)
        byte = torch.zeros(1, dtype=torch.uint8)
        rogue.plane.post_receive(byte, 1).wait(timeout_s)
        prefill.next(ChannelOpened)
        yield rogue


def _join(side: Side, frames: FrameSocket, timeout_s: float) -> DataPlane:
    spec = PlaneSpec(host=HOST, side=side, device="cpu", timeout_s=timeout_s)
    plane = open_plane(spec, ControlStore(frames, timeout_s))
    frames.set_timeout(timeout_s)
    return plane

"""The decode side's door: accepts prefill peers and owns their channels."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable

from phloem.shared.errors import PhloemError, overloaded
from phloem.shared.host_port import host_port
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Open, Opened, Refused, transfer_message
from phloem.shared.transfer.addresses import listen_on
from phloem.shared.transfer.admission import SeenEpochs, Strangers, refusal
from phloem.shared.transfer.config import TransferConfig
from phloem.shared.transfer.decode_channel import DecodeChannel
from phloem.shared.transfer.dialer import LEND_WAIT_S, MAX_OPENING_FRAME_BYTES
from phloem.shared.transfer.errors import channel_lost, protocol_violation
from phloem.shared.transfer.events import TransferEvent
from phloem.shared.transfer.frames import FrameSocket
from phloem.shared.transfer.handshake import (
    HANDSHAKE_TIMEOUT_S,
    handshake_deadline,
    prove_as_listener,
    transfer_key,
)
from phloem.shared.transfer.resources import Resources
from phloem.shared.transfer.staging_pool import StagingLease
from phloem.shared.transfer.stats import PeerMeter

log = logging.getLogger(__name__)


class Listener:
    """One accepting thread, and one thread per connection that becomes its channel's reading thread."""

    def __init__(
        self,
        config: TransferConfig,
        resources: Resources,
        deliver: Callable[[TransferEvent], None],
        meter_of: Callable[[PeerRef], PeerMeter],
    ) -> None:
        """Raises `address_unavailable`."""
        self._config = config
        self._resources = resources
        self._key = transfer_key(config.cluster_secret)
        self._deliver = deliver
        self._meter_of = meter_of
        self._socket = listen_on(config.host)
        self.address = host_port(config.host, self._socket.getsockname()[1])
        self._lock = threading.Lock()  # guards all below
        self._closing = threading.Event()
        self._strangers = Strangers()
        self._seen = SeenEpochs()
        self._channels: dict[str, DecodeChannel] = {}  # by the prefill worker's id: one epoch at a time
        self._connections: dict[FrameSocket, threading.Thread] = {}
        self._thread = threading.Thread(target=self._accept, name="phloem-transfer-accept", daemon=True)
        self._thread.start()

    def channel(self, peer: PeerRef) -> DecodeChannel | None:
        """The latest channel of the peer, open or not."""
        channel = self._channels.get(peer.worker_id)
        return channel if channel is not None and channel.peer == peer else None

    @property
    def num_open(self) -> int:
        with self._lock:
            return sum(channel.is_open for channel in self._channels.values())

    def drop(self, peer: PeerRef, error: PhloemError) -> None:
        """Ends the peer's channel with `error`; returns at once. The peer may come back."""
        channel = self.channel(peer)
        if channel is not None:
            channel.fail(error)

    def close(self, error: PhloemError) -> list[threading.Thread]:
        """Ends everything; returns at once, with the threads that are ending."""
        with self._lock:
            self._closing.set()
            channels = list(self._channels.values())
            connections = dict(self._connections)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        for channel in channels:
            channel.fail(error)
        for frames in connections:
            frames.shutdown()
        return [self._thread, *connections.values()]

    def _accept(self) -> None:
        with self._socket:
            while not self._closing.is_set():
                try:
                    sock, address = self._socket.accept()
                except OSError as error:
                    if not self._closing.is_set():
                        log.warning("accepting a transfer peer failed: %s", error)
                        self._closing.wait(0.1)  # out of descriptors: let some close
                else:
                    if not self._take(sock, address[0]):
                        sock.close()

    def _take(self, sock: socket.socket, host: str) -> bool:
        """Begins to serve a connection; False: it is to be closed."""
        name = f"phloem-transfer-in-{sock.fileno()}"
        with self._lock:
            if self._closing.is_set():
                return False
            if not self._strangers.enter(host):
                log.warning("too many unauthenticated transfer connections: one from %s is closed", host)
                return False
            try:
                frames = FrameSocket(sock)
                thread = threading.Thread(target=self._serve, args=(frames, host), name=name, daemon=True)
                thread.start()
            except (OSError, RuntimeError) as error:  # gone by now, or no more threads: serve those we have
                log.warning("a transfer peer can't be served: %s", error)
                self._strangers.leave(host)
                return False
            self._connections[frames] = thread
            return True

    def _serve(self, frames: FrameSocket, host: str) -> None:
        try:
            self._open_and_run(self._authenticated_open(frames, host), frames)
        except PhloemError as error:
            log.warning("a transfer connection from %s is refused: %s", host, error)
        except Exception:  # out of memory, or a bug of ours: others must still be served
            log.exception("serving a transfer connection")
        finally:
            frames.close()
            with self._lock:
                del self._connections[frames]

    def _open_and_run(self, request: Open, frames: FrameSocket) -> None:
        """From the peer's request to the loss of its channel, or its refusal."""
        lease: StagingLease | None = None
        try:
            self._check(request)
            lease = self._resources.pool.lend(f"from {request.prefill.worker_id}", LEND_WAIT_S)
            self._run(request, frames, lease)
        except PhloemError as error:
            log.warning("%s is refused a transfer channel: %s", request.prefill, error)
            frames.write(transfer_message.encode(Refused(error.code, str(error))))
        finally:
            if lease is not None:
                lease.close()  # nothing refers to the channel by now

    def _run(self, request: Open, frames: FrameSocket, lease: StagingLease) -> None:
        """Raises what the request is refused with."""
        channel, opened = self._register(request, frames, lease)
        try:
            frames.write(transfer_message.encode(opened))
        except PhloemError as error:
            channel.fail(error)
        try:
            self._resources.take_back(channel.peer, lease, channel.run())
        finally:
            with self._lock:
                if self._channels.get(channel.peer.worker_id) is channel:
                    del self._channels[channel.peer.worker_id]

    def _authenticated_open(self, frames: FrameSocket, host: str) -> Open:
        try:
            frames.set_timeout(HANDSHAKE_TIMEOUT_S)
            deadline = handshake_deadline(self._config.timeout_s)
            prove_as_listener(frames, self._key, deadline)
            message = transfer_message.decode(frames.read(MAX_OPENING_FRAME_BYTES, deadline))
        finally:
            with self._lock:
                self._strangers.leave(host)
        if isinstance(message, Refused):  # by the side that dials
            raise PhloemError(message.code, message.message)
        if not isinstance(message, Open):
            raise protocol_violation(f"the first message is {type(message).__name__}")
        return message

    def _check(self, request: Open) -> None:
        """Raises what the request is refused with. An older channel of the same worker ends now."""
        prefill = request.prefill
        with self._lock:
            others = sum(1 for worker_id in self._channels if worker_id != prefill.worker_id)
            newest = self._seen.newest(prefill.worker_id)
            refused = refusal(request, self._config, newest, others)
            if refused is not None:
                raise PhloemError(refused.code, refused.message)
            self._resources.stuck.check(prefill)
            self._seen.note(prefill.worker_id, prefill.epoch)
            older = self._channels.get(prefill.worker_id)
        if older is not None:
            older.fail(channel_lost(f"{prefill} opened a new channel"))

    def _register(
        self, request: Open, frames: FrameSocket, lease: StagingLease
    ) -> tuple[DecodeChannel, Opened]:
        """The channel; the last one of a worker that came in the meantime counts, unless its epoch is old."""
        prefill = request.prefill
        slot_bytes = min(request.staging_bytes, lease.slot_bytes)
        slots = lease.slots(request.channel_name, slot_bytes, self._config.staging_slots)
        channel = DecodeChannel(
            prefill,
            request.channel_name,
            self._resources.plane_spec("decode"),
            frames,
            self._deliver,
            self._meter_of(prefill),
            slots=slots,
        )
        with self._lock:
            if self._closing.is_set():
                raise overloaded("shutting down")
            if prefill.epoch < self._seen.newest(prefill.worker_id):
                raise PhloemError("stale_epoch", f"{prefill} is superseded")
            older = self._channels.get(prefill.worker_id)
            self._channels[prefill.worker_id] = channel
        if older is not None:
            older.fail(channel_lost(f"{prefill} opened a new channel"))
        return channel, Opened(slot_bytes, len(slots))

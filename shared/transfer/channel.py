"""One channel: three threads over a control connection and a data plane.

    the thread of `run`   reads control frames
    write                 sends what the outbox holds; posts data behind its header, which the device sends
                          once it is gathered
    complete              waits for gathered and posted data, in order; sends digests, or credits, or tells
                          the engine

Whoever sees something break calls `fail`; that silences the channel at once, and `run` takes it apart.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Rendezvous, TransferMessage, transfer_message
from phloem.shared.transfer.errors import channel_lost
from phloem.shared.transfer.events import ChannelLost, ChannelOpened, Side, TransferEvent
from phloem.shared.transfer.frames import KEEPALIVE, FrameSocket
from phloem.shared.transfer.mailbox import Mailbox
from phloem.shared.transfer.pending import Moved, Pending
from phloem.shared.transfer.planes import DataPlane, PlaneSpec, open_plane
from phloem.shared.transfer.rendezvous import ControlStore
from phloem.shared.transfer.staging import StagingSlot
from phloem.shared.transfer.stats import PeerMeter

log = logging.getLogger(__name__)

MAX_QUEUED_MESSAGES = 65_536
MAX_FRAME_BYTES = 1024 * 1024
KEEPALIVES_PER_TIMEOUT = 4


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message, or bytes, or a message about a slot: decode's Credit leaves when the device is done with
    `emptied`; of prefill's slot `num_bytes` leave when the device is done with `gathered`."""

    message: TransferMessage | None
    slot: StagingSlot | None = None
    num_bytes: int = 0
    emptied: Pending | None = None
    gathered: Moved | None = None


class Channel(ABC):
    """What both sides share. `deliver` must not block: it is called from all threads of the channel."""

    side: Side

    def __init__(
        self,
        peer: PeerRef,
        name: str,
        plane_spec: PlaneSpec,
        frames: FrameSocket,
        deliver: Callable[[TransferEvent], None],
        meter: PeerMeter,
    ) -> None:
        self.peer = peer
        self.name = name
        self._plane_spec = plane_spec
        self._timeout_s = plane_spec.timeout_s
        self._frames = frames
        self._deliver = deliver
        self._meter = meter
        self._outbox: Mailbox[Outgoing] = Mailbox(MAX_QUEUED_MESSAGES)
        self._state = threading.RLock()  # guards all below and the order of events
        self._plane: DataPlane | None = None
        self._is_open = False
        self._failed = threading.Event()
        self._error: ErrorInfo | None = None  # not the exception: its traceback would hold the plane

    # --- the engine's thread ---

    @property
    def is_open(self) -> bool:
        return self._is_open

    def send(self, message: TransferMessage) -> None:
        """Queues a message that no bytes follow. Raises `channel_lost`."""
        self._post(Outgoing(message))

    @property
    def is_idle(self) -> bool:
        """Nothing that was sent is still on its way, or the channel is lost."""
        return self._failed.is_set() or self._outbox.is_idle

    def fail(self, error: PhloemError) -> None:
        """Ends the channel: the first error wins and is delivered, no event follows. Any thread; returns at
        once."""
        with self._state:
            if self._error is not None:
                return
            self._error = error.info
            self._failed.set()
            if self._is_open:
                self._is_open = False
                self._deliver(ChannelLost(self.peer, self.side, error.info))
        log.info("channel %s (%s side) ends: %s", self.name, self.side, error)
        self._outbox.close()
        self._close_completions()
        self._frames.shutdown()

    # --- the channel's threads ---

    def run(self) -> ErrorInfo:
        """Opens the channel and serves it until it is lost; returns why. Raises nothing."""
        threads = [
            threading.Thread(target=self._guarded, args=(target,), name=self._thread_name(what), daemon=True)
            for what, target in (("write", self._write), ("complete", self._complete))
        ]
        self._guarded(lambda: self._serve(threads))
        self._failed.wait()
        if self._plane is not None:
            self._plane.abort()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        self._plane = None
        self._frames.close()
        assert self._error is not None
        return self._error

    @abstractmethod
    def _warm_up(self, plane: DataPlane) -> None:
        """Moves one byte from prefill to decode."""

    @abstractmethod
    def _on_message(self, message: TransferMessage, plane: DataPlane) -> None:
        """Raises `transfer_protocol` for what this side must not be sent."""

    @abstractmethod
    def _on_end_of_stream(self, error: PhloemError) -> None:
        """Nothing more can be read: sees to it that the channel fails."""

    @abstractmethod
    def _before_sending(self, item: Outgoing) -> None:
        """What is due before the message leaves."""

    @abstractmethod
    def _after_sending(self, item: Outgoing, plane: DataPlane) -> None:
        """What is due when the message has left."""

    @abstractmethod
    def _complete(self) -> None:
        """The loop of the completing thread; ends by an error."""

    @abstractmethod
    def _close_completions(self) -> None: ...

    def _serve(self, threads: list[threading.Thread]) -> None:
        store = ControlStore(self._frames, self._timeout_s)
        self._plane = plane = open_plane(self._plane_spec, store)
        self._warm_up(plane)
        store.seal()
        self._frames.set_timeout(self._timeout_s)
        self._meter.opened()
        self._announce()
        for thread in threads:
            thread.start()
        while (payload := self._read()) is not None:
            message = None if payload == KEEPALIVE else transfer_message.decode(payload)
            if message is not None and not isinstance(message, Rendezvous):  # told, but not waited for
                self._on_message(message, plane)

    def _read(self) -> bytes | None:
        try:
            return self._frames.read(MAX_FRAME_BYTES)
        except PhloemError as error:
            self._on_end_of_stream(error)
            return None

    def _announce(self) -> None:
        with self._state:
            if self._error is not None:
                raise PhloemError.from_info(self._error)
            self._is_open = True
            self._deliver(ChannelOpened(self.peer, self.side))

    def _write(self) -> None:
        plane = self._plane
        assert plane is not None
        while True:
            item = self._outbox.get(self._timeout_s / KEEPALIVES_PER_TIMEOUT)
            if item is None:
                self._frames.write(KEEPALIVE)
                continue
            self._before_sending(item)
            if item.message is not None:
                self._frames.write(transfer_message.encode(item.message))
            self._after_sending(item, plane)

    def _guarded(self, body: Callable[[], None]) -> None:
        """Runs a thread's body; however it ends, the channel ends with it."""
        try:
            body()
        except PhloemError as error:
            self.fail(error)
        except Exception:  # a bug of ours: the channel must still end with its event
            log.exception("channel %s (%s side)", self.name, self.side)
            self.fail(PhloemError("internal_error", "the transfer channel failed; see the worker's log"))

    def _emit(self, event: TransferEvent) -> None:
        with self._state:
            if self._is_open:
                self._deliver(event)

    def _post(self, item: Outgoing) -> None:
        if not self._is_open:
            raise not_open(self.peer)
        try:
            self._outbox.put(item)
        except PhloemError as error:
            self.fail(error)
            raise not_open(self.peer) from error

    def _deadline_from(self, posted_at: float) -> float:
        """Seconds that an operation posted at `posted_at` (monotonic) has left."""
        return posted_at + self._timeout_s - time.monotonic()

    def _thread_name(self, what: str) -> str:
        return f"phloem-transfer-{what}-{self.peer.worker_id}.{self.peer.epoch}"


def not_open(peer: PeerRef) -> PhloemError:
    return channel_lost(f"no open transfer channel with {peer.worker_id} (epoch {peer.epoch})")

"""One channel: a control connection and a data plane.

The engine's thread writes and posts by itself, in the order of its calls, and waits for nothing:

    engine    sends messages; announces pieces, and posts what prefill sends behind its gather
    run       reads control frames; posts what decode receives
    complete  waits for what was posted, in order; tells digests, or the engine that bytes came
    beat      says now and then that this side lives; writes what the connection did not take at once

Each hand-over from thread to thread would cost a wake-up and a turn for the interpreter, and the first piece
of a hand-over would wait for several. Whoever sees something break calls `fail`; that silences the channel at
once, and `run` takes it apart.
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
from phloem.shared.transfer.device_event import use_device
from phloem.shared.transfer.errand import Errand
from phloem.shared.transfer.errors import channel_lost
from phloem.shared.transfer.events import ChannelLost, ChannelOpened, Side, TransferEvent
from phloem.shared.transfer.frames import KEEPALIVE, FrameSocket
from phloem.shared.transfer.opening import Opening
from phloem.shared.transfer.planes import DataPlane, PlaneSpec
from phloem.shared.transfer.rendezvous import ControlStore
from phloem.shared.transfer.stats import PeerMeter

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 1024 * 1024
KEEPALIVES_PER_TIMEOUT = 4
# Of NCCL, beside what a plane waits for: it frees memory, and waits for the device and for others that do,
# seconds on a busy host.
MAX_ABORT_S = 70.0


@dataclass(frozen=True, slots=True)
class ChannelEnd:
    """What a channel ended with, and what is left of it: an opening that was given up and has not ended; or a
    plane that may still write to the staging memory, which must stay where it is, as must the plane."""

    error: ErrorInfo
    stuck: Opening | None = None
    holder: DataPlane | None = None


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
        self._wakes_beat = threading.Event()  # something is left to be written, or the channel has failed
        self._state = threading.RLock()  # guards all below and the order of events
        self._opening: Opening | None = None
        self._plane: DataPlane | None = None
        self._is_open = False
        self._failed = threading.Event()
        self._error: ErrorInfo | None = None  # not the exception: its traceback would hold the plane

    # --- the engine's thread ---

    @property
    def is_open(self) -> bool:
        return self._is_open

    def send(self, *messages: TransferMessage) -> None:
        """In one go. Never waits. Raises `channel_lost`."""
        if not self._is_open:
            raise not_open(self.peer)
        try:
            if not self._frames.post(*map(transfer_message.encode, messages)):
                self._wakes_beat.set()
        except PhloemError as error:
            self.fail(error)
            raise not_open(self.peer) from error

    @property
    def is_idle(self) -> bool:
        """Nothing that was sent is still on its way, or the channel is lost."""
        return self._failed.is_set() or self._frames.is_flushed

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
            if (opening := self._opening) is not None:
                opening.give_up(error.info)
        log.info("channel %s (%s side) ends: %s", self.name, self.side, error)
        self._wakes_beat.set()
        self._close_completions()
        self._frames.shutdown()

    # --- the channel's threads ---

    def run(self) -> ChannelEnd:
        """Opens the channel and serves it until it is lost. Raises nothing, and waits for nothing without
        bounds."""
        threads = [
            threading.Thread(target=self._guarded, args=(target,), name=self._thread_name(what), daemon=True)
            for what, target in (("beat", self._beat), ("complete", self._complete))
        ]
        self._guarded(lambda: self._serve(threads))
        self._failed.wait()
        holder = self._abort()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        stuck, self._opening, self._plane = self._opening, None, None
        self._frames.close()
        assert self._error is not None
        return ChannelEnd(self._error, stuck, holder)

    @abstractmethod
    def _on_message(self, message: TransferMessage, plane: DataPlane) -> None:
        """Raises `transfer_protocol` for what this side must not be sent."""

    @abstractmethod
    def _on_silence(self) -> None:
        """All that the peer has sent by now is handled."""

    @abstractmethod
    def _on_end_of_stream(self, error: PhloemError) -> None:
        """Nothing more can be read: sees to it that the channel fails."""

    @abstractmethod
    def _complete(self) -> None:
        """The loop of the completing thread; ends by an error."""

    @abstractmethod
    def _close_completions(self) -> None: ...

    def _serve(self, threads: list[threading.Thread]) -> None:
        self._plane = plane = self._open()
        use_device(self._plane_spec.device)  # this thread posts, and has had nothing to do with it
        self._frames.set_timeout(self._timeout_s)
        self._meter.opened()
        self._announce()
        for thread in threads:
            thread.start()
        while (payload := self._read()) is not None:
            message = None if payload == KEEPALIVE else transfer_message.decode(payload)
            if message is not None and not isinstance(message, Rendezvous):  # told, but not waited for
                self._on_message(message, plane)

    def _open(self) -> DataPlane:
        store = ControlStore(self._frames, self._plane_spec.opening_timeout_s)
        with self._state:
            self._check_not_failed()
            opening = self._opening = Opening(self._plane_spec, store, self._label)
        try:
            plane = opening.plane()
        except PhloemError as error:
            self.fail(error)  # the connection is shut: an opening that reads or writes ends
            store.seal()
            if opening.clean_up():
                self._opening = None
            raise
        store.seal()
        self._opening = None
        return plane

    def _abort(self) -> DataPlane | None:
        """The plane, if it has not let go of the staging memory."""
        if self._plane is None:
            return None
        try:
            abort = Errand(self._plane.abort, self._thread_name("abort"))
        except RuntimeError:  # no more threads
            return self._plane
        bound_s = self._plane_spec.longest_s + MAX_ABORT_S
        return None if abort.wait(bound_s) and not abort.failure else self._plane

    def _read(self) -> bytes | None:
        if not self._frames.has_frame:
            self._on_silence()
        try:
            return self._frames.read(MAX_FRAME_BYTES)
        except PhloemError as error:
            self._on_end_of_stream(error)
            return None

    def _announce(self) -> None:
        with self._state:
            self._check_not_failed()
            self._is_open = True
            self._deliver(ChannelOpened(self.peer, self.side))

    def _check_not_failed(self) -> None:
        if self._error is not None:
            raise PhloemError.from_info(self._error)

    def _beat(self) -> None:
        while not self._failed.is_set():
            if not self._wakes_beat.wait(self._timeout_s / KEEPALIVES_PER_TIMEOUT):
                self._frames.post(KEEPALIVE)
            self._wakes_beat.clear()
            self._frames.flush()

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

    def _deadline_from(self, posted_at: float) -> float:
        """Seconds that an operation posted at `posted_at` (monotonic) has left."""
        return posted_at + self._timeout_s - time.monotonic()

    def _thread_name(self, what: str) -> str:
        return f"phloem-transfer-{what}-{self._label}"

    @property
    def _label(self) -> str:
        return f"{self.peer.worker_id}.{self.peer.epoch}"


def not_open(peer: PeerRef) -> PhloemError:
    return channel_lost(f"no open transfer channel with {peer}")

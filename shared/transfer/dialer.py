"""The prefill side's hold on one decode peer: dials until a channel opens, serves it, dials again."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.host_port import split_host_port
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Open, Opened, Refused, transfer_message
from phloem.shared.transfer.config import TransferConfig
from phloem.shared.transfer.errors import channel_lost, protocol_violation
from phloem.shared.transfer.events import ChannelLost, ChannelOpened, TransferEvent
from phloem.shared.transfer.frames import FrameSocket
from phloem.shared.transfer.handshake import handshake_deadline, prove_as_dialer, transfer_key
from phloem.shared.transfer.prefill_channel import PrefillChannel
from phloem.shared.transfer.redial import REFUSED_FOR_NOW, Redial
from phloem.shared.transfer.resources import Resources
from phloem.shared.transfer.staging_pool import StagingLease
from phloem.shared.transfer.stats import PeerMeter

log = logging.getLogger(__name__)

LEND_WAIT_S = 1.0  # for the memory of a channel that is just ending
MAX_CREDITS = 1024
MAX_OPENING_FRAME_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class _Attempt:
    error: ErrorInfo
    is_final: bool = False
    had_channel: bool = False  # whose end is in the log


class Dialer:
    """Owns the channel to one (worker, epoch) and the thread that makes it."""

    def __init__(
        self,
        peer: PeerRef,
        address: str,
        config: TransferConfig,
        resources: Resources,
        deliver: Callable[[TransferEvent], None],
        meter: PeerMeter,
    ) -> None:
        """Raises `bad_address`."""
        self.peer = peer
        self.address = address
        self._host, self._port = split_host_port(address)
        self._config = config
        self._resources = resources
        self._deliver_to_engine = deliver
        self._meter = meter
        self._redial = Redial()
        self._stopped = threading.Event()
        self._retry = threading.Event()  # set: the pause is over
        self._lock = threading.Lock()  # guards the two below
        self._frames: FrameSocket | None = None
        self._channel: PrefillChannel | None = None
        name = f"phloem-transfer-dial-{peer.worker_id}.{peer.epoch}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def channel(self) -> PrefillChannel | None:
        """The channel, open or not."""
        return self._channel

    @property
    def cut_off(self) -> ErrorInfo | None:
        """Why there is no channel and won't be one soon."""
        return self._redial.cut_off(time.monotonic())

    def retry_soon(self) -> None:
        """What the last attempt lacked may be there now."""
        self._retry.set()

    def stop(self, error: PhloemError) -> None:
        """Ends the channel with `error` and dials no more; returns at once."""
        with self._lock:
            self._stopped.set()
            self._retry.set()
            frames, channel = self._frames, self._channel
        if channel is not None:
            channel.fail(error)
        if frames is not None:
            frames.shutdown()

    @property
    def thread(self) -> threading.Thread:
        """It ends some time after `stop`."""
        return self._thread

    def _run(self) -> None:
        while not self._stopped.is_set():
            began_s = time.monotonic()
            self._retry.clear()
            attempt = self._attempt_guarded()
            if attempt.is_final:
                log.warning("%s refuses KV transfer: %s", self.peer, attempt.error.message)
                self._redial.refused(attempt.error)
                self._deliver_to_engine(ChannelLost(self.peer, "prefill", attempt.error))
                return
            pause_s = self._redial.failed(attempt.error, began_s)
            if not self._stopped.is_set():
                self._log(attempt, pause_s)
                self._retry.wait(pause_s)

    def _log(self, attempt: _Attempt, pause_s: float) -> None:
        """Why there is no channel, once for each attempt."""
        error = self.cut_off
        if error is not None:
            log.warning(
                "no KV channel with %s, requests go elsewhere, next try in %.0f s: %s",
                self.peer,
                pause_s,
                error.message,
            )
        elif not attempt.had_channel:
            log.info(
                "no transfer channel to %s at %s yet: %s", self.peer, self.address, attempt.error.message
            )

    def _deliver(self, event: TransferEvent) -> None:
        if isinstance(event, ChannelOpened):
            self._redial.opened(time.monotonic())
        elif isinstance(event, ChannelLost):
            self._redial.lost(event.error, time.monotonic())
        self._deliver_to_engine(event)

    def _attempt_guarded(self) -> _Attempt:
        try:
            return self._attempt()
        except PhloemError as error:
            return _Attempt(error.info)
        except Exception:  # out of memory, or a bug of ours: the next attempt may do better
            log.exception("dialing %s at %s", self.peer, self.address)
            return _Attempt(channel_lost("dialing failed").info)

    def _attempt(self) -> _Attempt:
        """One channel from dial to loss, or the reason why there was none."""
        stuck, patience_s = self._resources.stuck, self._config.opening_timeout_s
        stuck.check(self.peer)
        stuck.wait_for_end(self.peer, patience_s, self._stopped)
        if self._stopped.is_set():
            raise channel_lost("nobody wants it any more")
        deadline = handshake_deadline(self._config.timeout_s)
        frames = self._connect(deadline)
        lease: StagingLease | None = None
        try:
            prove_as_dialer(frames, transfer_key(self._config.cluster_secret), deadline)
            lease = self._borrow(frames, deadline)
            name, opened = self._open(frames, lease.slot_bytes, deadline)
            if isinstance(opened, Refused):
                retryable = opened.code in REFUSED_FOR_NOW
                error = PhloemError(opened.code, opened.message, retryable=retryable, http_status=503)
                return _Attempt(error.info, is_final=not retryable)
            # No variable holds the channel: with its slots, it is gone when their memory is given back.
            end = self._make_channel(name, opened, frames, lease).run()
            self._resources.take_back(self.peer, lease, end)
            return _Attempt(end.error, had_channel=True)
        finally:
            with self._lock:
                self._frames = self._channel = None
            frames.close()
            if lease is not None:
                lease.close()

    def _borrow(self, frames: FrameSocket, deadline: float) -> StagingLease:
        """Memory for the channel. Raises `staging_full`, and tells the peer."""
        try:
            return self._resources.pool.lend(f"to {self.peer.worker_id}", LEND_WAIT_S)
        except PhloemError as error:
            with contextlib.suppress(PhloemError):  # it may be gone: what we lack is the reason all the same
                frames.write(transfer_message.encode(Refused(error.code, str(error))), deadline)
            raise

    def _connect(self, deadline: float) -> FrameSocket:
        timeout_s = deadline - time.monotonic()
        try:
            frames = FrameSocket(socket.create_connection((self._host, self._port), timeout_s))
        except OSError as error:
            raise channel_lost(f"can't connect: {error}") from error
        with self._lock:
            self._frames = frames
            if self._stopped.is_set():
                frames.shutdown()
        return frames

    def _open(self, frames: FrameSocket, staging_bytes: int, deadline: float) -> tuple[str, Opened | Refused]:
        me = self._config.me
        nonce = secrets.token_hex(8)
        name = f"{me.worker_id}.{me.epoch}-{self.peer.worker_id}.{self.peer.epoch}-{nonce}"
        config = self._config
        request = Open(me, self.peer, config.kv_layout, staging_bytes, name, config.device_id, config.link)
        frames.write(transfer_message.encode(request), deadline)
        answer = transfer_message.decode(frames.read(MAX_OPENING_FRAME_BYTES, deadline))
        match answer:
            case Refused():
                return name, answer
            case Opened() if 0 < answer.staging_bytes <= staging_bytes and 0 < answer.credits <= MAX_CREDITS:
                return name, answer
            case _:
                raise protocol_violation(f"the answer to Open makes no sense: {answer}")

    def _make_channel(
        self, name: str, opened: Opened, frames: FrameSocket, lease: StagingLease
    ) -> PrefillChannel:
        channel = PrefillChannel(
            self.peer,
            name,
            self._resources.plane_spec("prefill"),
            frames,
            self._deliver,
            self._meter,
            slots=lease.slots(name, opened.staging_bytes, opened.credits),
            credits=opened.credits,
        )
        with self._lock:
            if self._stopped.is_set():
                raise channel_lost("no longer wanted")
            self._channel = channel
        return channel

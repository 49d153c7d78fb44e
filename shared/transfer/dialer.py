"""The prefill side's hold on one decode peer: dials until a channel opens, serves it, dials again."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Open, Opened, Refused, transfer_message
from phloem.shared.transfer.addresses import parse_address
from phloem.shared.transfer.config import TransferConfig
from phloem.shared.transfer.errors import channel_lost, protocol_violation
from phloem.shared.transfer.events import ChannelLost, TransferEvent
from phloem.shared.transfer.frames import FrameSocket
from phloem.shared.transfer.handshake import handshake_deadline, prove_as_dialer, transfer_key
from phloem.shared.transfer.planes import PlaneSpec
from phloem.shared.transfer.prefill_channel import PrefillChannel
from phloem.shared.transfer.stats import PeerMeter

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0
MAX_CREDITS = 1024
MAX_OPENING_FRAME_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class _Attempt:
    error: ErrorInfo
    is_final: bool = False


class Dialer:
    """Owns the channel to one (worker, epoch) and the thread that makes it."""

    def __init__(
        self,
        peer: PeerRef,
        address: str,
        config: TransferConfig,
        deliver: Callable[[TransferEvent], None],
        meter: PeerMeter,
    ) -> None:
        """Raises `bad_address`."""
        self.peer = peer
        self.address = address
        self._host, self._port = parse_address(address)
        self._config = config
        self._deliver = deliver
        self._meter = meter
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # guards the two below
        self._frames: FrameSocket | None = None
        self._channel: PrefillChannel | None = None
        name = f"phloem-transfer-dial-{peer.worker_id}.{peer.epoch}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def channel(self) -> PrefillChannel | None:
        """The latest channel, open or not."""
        return self._channel

    def stop(self, error: PhloemError) -> None:
        """Ends the channel with `error` and dials no more; returns at once."""
        with self._lock:
            self._stopped.set()
            frames, channel = self._frames, self._channel
        if channel is not None:
            channel.fail(error)
        if frames is not None:
            frames.shutdown()

    def join(self) -> None:
        """Waits for the thread to end, at most about the transfer timeout after `stop`."""
        self._thread.join()

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def _run(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._stopped.is_set():
            started = time.monotonic()
            attempt = self._attempt_guarded()
            if attempt.is_final:
                log.warning("%s refuses KV transfer: %s", self.peer, attempt.error.message)
                self._deliver(ChannelLost(self.peer, "prefill", attempt.error))
                return
            lived_long = time.monotonic() - started > MAX_BACKOFF_S
            backoff_s = FIRST_BACKOFF_S if lived_long else min(2 * backoff_s, MAX_BACKOFF_S)
            self._stopped.wait(backoff_s)

    def _attempt_guarded(self) -> _Attempt:
        try:
            return self._attempt()
        except PhloemError as error:
            log.info("no transfer channel to %s at %s yet: %s", self.peer, self.address, error)
            return _Attempt(error.info)
        except Exception:  # out of memory, or a bug of ours: the next attempt may do better
            log.exception("dialing %s at %s", self.peer, self.address)
            return _Attempt(channel_lost("dialing failed").info)

    def _attempt(self) -> _Attempt:
        """One channel from dial to loss, or the reason why there was none."""
        deadline = handshake_deadline(self._config.timeout_s)
        frames = self._connect(deadline)
        try:
            name, opened = self._open(frames, deadline)
            if isinstance(opened, Refused):
                retryable = opened.code == "overloaded"
                error = PhloemError(opened.code, opened.message, retryable=retryable, http_status=503)
                return _Attempt(error.info, is_final=not retryable)
            channel = self._make_channel(name, opened, frames)
            return _Attempt(channel.run())
        finally:
            with self._lock:
                self._frames = None
            frames.close()

    def _connect(self, deadline: float) -> FrameSocket:
        timeout_s = deadline - time.monotonic()
        try:
            sock = socket.create_connection((self._host, self._port), timeout_s)
        except OSError as error:
            raise channel_lost(f"can't connect: {error}") from error
        frames = FrameSocket(sock)
        with self._lock:
            self._frames = frames
            if self._stopped.is_set():
                frames.shutdown()
        return frames

    def _open(self, frames: FrameSocket, deadline: float) -> tuple[str, Opened | Refused]:
        prove_as_dialer(frames, transfer_key(self._config.cluster_secret), deadline)
        me = self._config.me
        nonce = secrets.token_hex(8)
        name = f"{me.worker_id}.{me.epoch}-{self.peer.worker_id}.{self.peer.epoch}-{nonce}"
        staging_bytes = self._config.staging_bytes
        layout, device_id = self._config.kv_layout, self._config.device_id
        request = Open(me, self.peer, layout, staging_bytes, name, device_id)
        frames.write(transfer_message.encode(request))
        answer = transfer_message.decode(frames.read(MAX_OPENING_FRAME_BYTES, deadline))
        match answer:
            case Refused():
                return name, answer
            case Opened() if 0 < answer.staging_bytes <= staging_bytes and 0 < answer.credits <= MAX_CREDITS:
                return name, answer
            case _:
                raise protocol_violation(f"the answer to Open makes no sense: {answer}")

    def _make_channel(self, name: str, opened: Opened, frames: FrameSocket) -> PrefillChannel:
        config = self._config
        spec = PlaneSpec(
            host=config.host,
            side="prefill",
            device=config.device,
            timeout_s=config.timeout_s,
            max_ctas=config.max_ctas,
        )
        channel = PrefillChannel(
            self.peer,
            name,
            spec,
            frames,
            self._deliver,
            self._meter,
            staging_bytes=opened.staging_bytes,
            staging_slots=config.staging_slots,
            credits=opened.credits,
        )
        with self._lock:
            if self._stopped.is_set():
                raise channel_lost("no longer wanted")
            self._channel = channel
        return channel

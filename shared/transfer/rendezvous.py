"""How the two ranks of a channel find each other: over the control connection that has proven itself.

torch's TCPStore would do, but it has no authentication, listens for strangers, and looks up the name of each
peer's address: where DNS is slow or dead a channel opened after 5 s or never (torch 2.13).
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]  # not in the stubs

from phloem.shared.protocol.transfer import Rendezvous, transfer_message
from phloem.shared.transfer.errors import channel_lost, protocol_violation
from phloem.shared.transfer.frames import KEEPALIVE, FrameSocket

MAX_KEYS = 64
MAX_FRAME_BYTES = 64 * 1024


class ControlStore(Store):
    """A store of two ranks, for the opening of one channel and for the thread that opens it.

    What one rank sets is written to the other; who waits for a key reads until it comes. Waits raise
    `transfer_timeout` at their deadline, and `channel_lost` as soon as the connection is shut.
    """

    def __init__(self, frames: FrameSocket, timeout_s: float) -> None:
        super().__init__()
        self._frames = frames
        self._timeout_s = timeout_s
        self._values: dict[str, bytes] = {}
        self._using = threading.Lock()  # of who uses the connection; guards the next one
        self._sealed = False

    def beat(self) -> None:
        """Tells the peer that this side lives, whose own opening may be over by now. Never waits. Raises
        `channel_lost` when the connection has broken, which nobody would read while NCCL is at work: the
        second beat after the peer has left, if not the first."""
        self._frames.post(KEEPALIVE)

    def seal(self) -> None:
        """The channel is open and other threads have the connection, or it is shut and about to be closed:
        from now on nothing is told or heard. Waits for who is at it, whom a shut connection lets go."""
        with self._using:
            self._sealed = True

    def set(self, key: str, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._values[key] = data
        with self._using:
            if not self._sealed:
                self._frames.write(transfer_message.encode(Rendezvous(key, data)))

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        timeout_s = self._timeout_s if timeout is None else min(self._timeout_s, timeout.total_seconds())
        deadline = time.monotonic() + timeout_s
        while not self.check(keys):
            self._read(deadline)

    def _read(self, deadline: float) -> None:
        with self._using:
            if self._sealed:
                raise channel_lost("the ranks have met already")
            payload = self._frames.read(MAX_FRAME_BYTES, deadline)
        if payload == KEEPALIVE:
            return
        message = transfer_message.decode(payload)
        if not isinstance(message, Rendezvous) or len(self._values) >= MAX_KEYS:
            raise protocol_violation(f"{type(message).__name__} came while the channel opened")
        self._values[message.key] = message.value

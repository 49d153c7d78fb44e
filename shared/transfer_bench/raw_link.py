"""Plain sends over the same kind of process group as a channel's, and the connection that paces them."""

from __future__ import annotations

import socket
import time

import torch
from torch import Tensor

from phloem.shared.errors import PhloemError
from phloem.shared.transfer.events import Side
from phloem.shared.transfer.frames import FrameSocket
from phloem.shared.transfer.pending import Pending
from phloem.shared.transfer.planes import PlaneSpec, open_plane
from phloem.shared.transfer.rendezvous import ControlStore

_POSTED = b"posted"
_MAX_FRAME_BYTES = 64


class RawLink:
    """One rank of a two-rank group. `buffer` (uint8, on the device) is sent from or received into."""

    def __init__(self, sock: socket.socket, spec: PlaneSpec, buffer: Tensor) -> None:
        """Raises `PhloemError` when the other rank does not come."""
        self._frames = FrameSocket(sock)
        self._frames.set_timeout(spec.timeout_s)
        store = ControlStore(self._frames, spec.timeout_s)
        self._plane = open_plane(spec, store)
        self._side: Side = spec.side
        self._timeout_s = spec.timeout_s
        self._device = torch.device(spec.device)
        self._buffer = buffer
        self._move(1, 1)  # NCCL connects with the first bytes
        store.seal()
        self._frames.set_timeout(spec.timeout_s)

    def run(self, num_bytes: int, count: int, *, ahead: bool) -> list[float]:
        """When each message began or was there, in monotonic seconds."""
        if ahead:
            return [self._turn(num_bytes, count)]
        return [self._turn(num_bytes, 1) for _ in range(count)]

    def close(self) -> None:
        self._plane.abort()
        self._frames.shutdown()
        self._frames.close()

    def _turn(self, num_bytes: int, count: int) -> float:
        """The receives are posted before the sender's clock starts."""
        if self._side == "prefill":
            if self._frames.read(_MAX_FRAME_BYTES) != _POSTED:
                raise PhloemError("bench_failed", "the ranks lost step")
            began_s = time.monotonic()
            self._move(num_bytes, count)
            return began_s
        self._move(num_bytes, count, posted=True)
        return time.monotonic()

    def _move(self, num_bytes: int, count: int, *, posted: bool = False) -> None:
        data = self._buffer[:num_bytes]
        pending = [self._post(data) for _ in range(count)]
        if posted:
            self._frames.write(_POSTED)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # to the microsecond; a Pending is polled
        for operation in pending:
            operation.wait(self._timeout_s)

    def _post(self, data: Tensor) -> Pending:
        if self._side == "prefill":
            return self._plane.post_send(data)
        return self._plane.post_receive(data, data.numel())

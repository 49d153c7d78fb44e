"""Plain sends over the same kind of process group as a channel's, and the connection that paces them.

On GPUs they are torch's own `send` and `recv`, as any program would call them, and nothing of the channel's.
"""

from __future__ import annotations

import socket
import time
from typing import Any, Protocol

import torch
from torch import Tensor

from phloem.shared.errors import PhloemError
from phloem.shared.transfer.events import Side
from phloem.shared.transfer.frames import FrameSocket
from phloem.shared.transfer.pending import Pending
from phloem.shared.transfer.planes import RANKS, DataPlane, PlaneSpec, open_plane
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
        self._device = torch.device(spec.device)
        self._wire: _Wire = (
            _TorchWire(spec, store) if self._device.type == "cuda" else _PlaneWire(spec, store)
        )
        self._side: Side = spec.side
        self._timeout_s = spec.timeout_s
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
        self._wire.abort()
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
        for _ in range(count):
            self._wire.post(data)
        if posted:
            self._frames.write(_POSTED)
        self._wire.wait(self._timeout_s)


class _Wire(Protocol):
    def post(self, data: Tensor) -> None: ...

    def wait(self, timeout_s: float) -> None:
        """For all that was posted."""

    def abort(self) -> None: ...


class _PlaneWire:
    """A CPU's."""

    def __init__(self, spec: PlaneSpec, store: ControlStore) -> None:
        self._plane: DataPlane = open_plane(spec, store)
        self._sends = spec.side == "prefill"
        self._posted: list[Pending] = []

    def post(self, data: Tensor) -> None:
        plane = self._plane
        self._posted.append(plane.post_send(data) if self._sends else plane.post_receive(data, data.numel()))

    def wait(self, timeout_s: float) -> None:
        for operation in self._posted:
            operation.wait(timeout_s)
        self._posted.clear()

    def abort(self) -> None:
        self._plane.abort()


class _TorchWire:
    """torch's own operations, and its wait for the device, to the microsecond."""

    def __init__(self, spec: PlaneSpec, store: ControlStore) -> None:
        from phloem.shared.transfer.nccl_group import join_group

        self._group = join_group(spec, store, spec.max_ctas)  # all of which a large message uses
        self._device = torch.device(spec.device)
        self._post = self._group.send if spec.side == "prefill" else self._group.recv
        self._peer = 1 - RANKS[spec.side]
        self._posted: list[Any] = []  # torch's stubs keep Work in a private module

    def post(self, data: Tensor) -> None:
        self._posted.append(self._post([data], self._peer, 0))

    def wait(self, timeout_s: float) -> None:
        del timeout_s  # who measures gives up on a rank that says nothing
        torch.cuda.synchronize(self._device)
        self._posted.clear()

    def abort(self) -> None:
        self._group.abort()

"""NCCL's own send and receive on a communicator of torch's.

torch's `send` makes a work object, records and awaits events of several streams, and takes the host some 50
us; `ncclSend` is what remains of it when the caller keeps streams and events itself. Only these two are
called so: torch makes the communicator, and aborts it.

The first call connects to the peer, and waits for it: other threads have the interpreter meanwhile. Those
after it only queue a kernel, and keep the interpreter, as `kernels.cuda_driver` does and for the same reason.
While channels come or go they let go of it, too, as its calls do.
NCCL itself has room for thousands of operations that the device has not begun; a channel has one for each
slot.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from phloem.kernels.cuda_driver import CudaDriver
from phloem.shared.transfer.errors import channel_lost

_LIBRARY = "libnccl.so.2"  # loaded by torch
_UINT8 = 1  # ncclUint8
_SUCCESS = 0


class NcclCalls:
    """Of one communicator of two ranks. Who calls sees to it that nobody aborts it meanwhile."""

    def __init__(self, communicator: int, peer: int, driver: CudaDriver, opening_timeout_s: float) -> None:
        """`opening_timeout_s`: what a call that connects may take. Raises `channel_lost` when torch's NCCL
        can't be called."""
        if not communicator:
            raise channel_lost("torch has no NCCL communicator for the channel")
        try:
            library, keeping = ctypes.CDLL(_LIBRARY), ctypes.PyDLL(_LIBRARY)
        except OSError as error:
            raise channel_lost(f"torch's NCCL can't be called: {error}") from error
        self._communicator = ctypes.c_void_p(communicator)
        self._peer = ctypes.c_int(peer)
        self._type = ctypes.c_int(_UINT8)
        # The address, count, type, peer, communicator and stream are given as such: no types are declared.
        self._send = _Direction(keeping.ncclSend, library.ncclSend, driver, opening_timeout_s)
        self._receive = _Direction(keeping.ncclRecv, library.ncclRecv, driver, opening_timeout_s)
        self._tell = library.ncclGetErrorString
        self._tell.restype = ctypes.c_char_p

    def send(self, data: Tensor, num_bytes: int, stream: torch.cuda.Stream) -> None:
        """Queues the sending of the first `num_bytes` of `data` (uint8, contiguous) in `stream`. Raises
        `channel_lost`."""
        self._call(self._send, data, num_bytes, stream)

    def receive(self, data: Tensor, num_bytes: int, stream: torch.cuda.Stream) -> None:
        """Queues the receiving of just as many bytes. Raises `channel_lost`."""
        self._call(self._receive, data, num_bytes, stream)

    def _call(self, direction: _Direction, data: Tensor, num_bytes: int, stream: torch.cuda.Stream) -> None:
        result = direction(
            ctypes.c_void_p(data.data_ptr()),
            ctypes.c_size_t(num_bytes),
            self._type,
            self._peer,
            self._communicator,
            ctypes.c_void_p(stream.cuda_stream),
        )
        if result != _SUCCESS:
            raise channel_lost(f"NCCL fails: {self._tell(ctypes.c_int(result)).decode()}")


class _Direction:
    """Of a communicator. Its first call that NCCL takes connects."""

    def __init__(
        self,
        keeping: Callable[..., int],
        yielding: Callable[..., int],
        driver: CudaDriver,
        opening_timeout_s: float,
    ) -> None:
        self._keeping, self._yielding = keeping, yielding
        self._driver = driver
        self._opening_timeout_s = opening_timeout_s
        self._is_connected = False

    def __call__(self, *arguments: object) -> int:
        if not self._is_connected:
            with self._driver.giving_way(self._opening_timeout_s):
                result = self._yielding(*arguments)
            self._is_connected = result == _SUCCESS
            return result
        keeps = not self._driver.gives_way  # nobody has a turn until the call
        return self._keeping(*arguments) if keeps else self._yielding(*arguments)

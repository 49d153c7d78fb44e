"""NCCL's own send and receive on a communicator of torch's.

torch's `send` makes a work object, records and awaits events of several streams, and takes the host some 50
us; `ncclSend` is what remains of it when the caller keeps streams and events itself. Only these two are
called so: torch makes the communicator, and aborts it.

The first call connects to the peer, and waits for it: other threads have the interpreter meanwhile. Those
after it only queue a kernel, and keep the interpreter, as `kernels.cuda_driver` does and for the same reason.
NCCL itself has room for thousands of operations that the device has not begun; a channel has one for each
slot.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from phloem.shared.transfer.errors import channel_lost

_LIBRARY = "libnccl.so.2"  # loaded by torch
_UINT8 = 1  # ncclUint8
_SUCCESS = 0


class NcclCalls:
    """Of one communicator of two ranks. Who calls sees to it that nobody aborts it meanwhile."""

    def __init__(self, communicator: int, peer: int) -> None:
        """Raises `channel_lost` when torch's NCCL can't be called."""
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
        self._send, self._receive = library.ncclSend, library.ncclRecv
        self._send_at_once, self._receive_at_once = keeping.ncclSend, keeping.ncclRecv
        self._tell = library.ncclGetErrorString
        self._tell.restype = ctypes.c_char_p

    def send(self, data: Tensor, num_bytes: int, stream: torch.cuda.Stream) -> None:
        """Queues the sending of the first `num_bytes` of `data` (uint8, contiguous) in `stream`. Raises
        `channel_lost`."""
        self._call(self._send, data, num_bytes, stream)
        self._send = self._send_at_once

    def receive(self, data: Tensor, num_bytes: int, stream: torch.cuda.Stream) -> None:
        """Queues the receiving of just as many bytes. Raises `channel_lost`."""
        self._call(self._receive, data, num_bytes, stream)
        self._receive = self._receive_at_once

    def _call(
        self, function: ctypes._NamedFuncPointer, data: Tensor, num_bytes: int, stream: torch.cuda.Stream
    ) -> None:
        result = function(
            ctypes.c_void_p(data.data_ptr()),
            ctypes.c_size_t(num_bytes),
            self._type,
            self._peer,
            self._communicator,
            ctypes.c_void_p(stream.cuda_stream),
        )
        if result != _SUCCESS:
            raise channel_lost(f"NCCL fails: {self._tell(ctypes.c_int(result)).decode()}")

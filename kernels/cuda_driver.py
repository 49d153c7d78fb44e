"""The few calls of CUDA's driver that a hand-over's pieces wait for, made without a word to other threads.

Whoever calls CUDA through torch, Triton or `cuda.bindings` lets go of Python's interpreter meanwhile, and
gets it back when the thread that took it is done or has had its turn: 50 to 700 us for a call of 3 us, in a
process whose threads all have a little to do. The calls here keep the interpreter. They may, since none of
them waits for the device or a peer:

- To record or query an event, or to make a stream wait for one, is to write or read a queue's end.
- A launch waits when its stream's queue is full, after a thousand entries; a channel has a handful of pieces
  under way, of three entries each, and steps are launched two ahead.
- To launch, and to create or record an event, takes the driver's lock of the context. Others hold it for
  microseconds, but for who frees memory or loads a kernel: CUDA waits for all kernels of the device then, and
  keeps the lock. One of them may be the receive of a peer that hangs, and only a thread that has the
  interpreter can end that.

NCCL frees memory as a channel goes, and maybe as one comes. So while channels come or go, and while a receive
waits for long, calls let go of the interpreter: `giving_way`. (Without that, a peer killed while another one
hung stopped a whole engine for good: tests/gpu/test_cuda_survivors.py. torch had the same: its pull request
119393.) What is left: a kernel that is loaded for its first use, or memory that torch frees as it runs out,
within the first moment of a hang.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator
from typing import Any

_LIBRARY = "libcuda.so.1"
_SUCCESS = 0
_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING

_INT, _UINT, _POINTER = ctypes.c_int, ctypes.c_uint, ctypes.c_void_p
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuInit": (_UINT,),
    "cuDeviceGet": (_POINTER, _INT),
    "cuDevicePrimaryCtxRetain": (_POINTER, _INT),
    "cuCtxSetCurrent": (_POINTER,),
    "cuEventCreate": (_POINTER, _UINT),
    "cuEventRecord": (_POINTER, _POINTER),
    "cuEventQuery": (_POINTER,),
    "cuStreamWaitEvent": (_POINTER, _POINTER, _UINT),
    "cuLaunchKernel": (_POINTER, *[_UINT] * 7, _POINTER, _POINTER, _POINTER),
    "cuGetErrorName": (_INT, _POINTER),
}


class CudaDriver:
    """Of one device, in its primary context, which torch uses too. Thread-safe: a thread that calls has this
    device from then on, for torch's calls as well. Streams, events and kernels are handles. All raise
    `RuntimeError` when the driver refuses, also for what it failed at before."""

    def __init__(self, keeping: Any, yielding: Any, device: int) -> None:
        """The driver's library, whose functions keep the interpreter, and the same whose functions let go of
        it; `device`: as torch counts them."""
        for library in (keeping, yielding):
            for name, arguments in _ARGUMENTS.items():
                getattr(library, name).argtypes = arguments
        self._keeping, self._yielding = keeping, yielding
        # No line that reads it calls anything between that and its own call: nobody gets a turn there (but by
        # a finalizer in a garbage collection, which Python 3.11 may make when it builds the arguments).
        self._library = library = keeping
        self.gives_way = False
        self._long_calls: set[object] = set()
        self._changing = threading.Lock()  # of these
        self._idle_events: list[int] = []
        self._here = threading.local()  # whether the thread has the context
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        self._checked(library.cuInit(0))
        self._checked(library.cuDeviceGet(ctypes.byref(handle), device))
        self._checked(library.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
        self._context = context

    @contextlib.contextmanager
    def giving_way(self, at_most_s: float | None = None) -> Iterator[None]:
        """Around a call that may keep the driver's lock until another thread has had its turn. Meanwhile, or
        for so long, the calls here, of any thread, let go of the interpreter; other libraries' callers look
        at `gives_way`."""
        call = object()
        timer = None if at_most_s is None else threading.Timer(at_most_s, self._end_long_call, (call,))
        with self._changing:
            self._long_calls.add(call)
            self._choose()
        try:
            if timer is not None:
                timer.daemon = True
                timer.start()
            yield
        finally:
            if timer is not None:
                timer.cancel()
            self._end_long_call(call)

    def new_event(self) -> int:
        with contextlib.suppress(IndexError):
            return self._idle_events.pop()
        self._enter()
        event = ctypes.c_void_p()
        place = ctypes.byref(event)
        self._checked(self._library.cuEventCreate(place, _DISABLE_TIMING))
        assert event.value is not None
        return event.value

    def drop_event(self, event: int) -> None:
        """Somebody else's from now on. What waits for it on the device still does."""
        self._idle_events.append(event)

    def record(self, event: int, stream: int) -> None:
        self._enter()
        self._checked(self._library.cuEventRecord(event, stream))

    def is_done(self, event: int) -> bool:
        self._enter()
        result = self._library.cuEventQuery(event)
        if result != _NOT_READY:
            self._checked(result)
        return bool(result == _SUCCESS)

    def hold_back(self, stream: int, event: int) -> None:
        """What `stream` is given from now on begins, on the device, when `event` is done."""
        self._enter()
        self._checked(self._library.cuStreamWaitEvent(stream, event, 0))

    def launch(
        self, function: int, num_blocks: int, num_threads: int, shared_bytes: int, stream: int, arguments: Any
    ) -> None:
        """`arguments`: a ctypes array of the addresses of the kernel's arguments. They are read at once."""
        self._enter()
        self._checked(
            self._library.cuLaunchKernel(
                function, num_blocks, 1, 1, num_threads, 1, 1, shared_bytes, stream, arguments, None
            )
        )

    def _end_long_call(self, call: object) -> None:
        with self._changing:
            self._long_calls.discard(call)
            self._choose()

    def _choose(self) -> None:
        self.gives_way = bool(self._long_calls)
        self._library = self._yielding if self.gives_way else self._keeping

    def _enter(self) -> None:
        if not hasattr(self._here, "entered"):
            self._checked(self._library.cuCtxSetCurrent(self._context))
            self._here.entered = True

    def _checked(self, result: int) -> None:
        if result != _SUCCESS:
            name = ctypes.c_char_p()
            place = ctypes.byref(name)
            self._library.cuGetErrorName(result, place)
            raise RuntimeError(f"CUDA's driver fails: {(name.value or b'').decode() or result}")


class CudaEvent:
    """A place in a stream, of torch's `Event` what a hand-over needs; streams are torch's."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._handle = driver.new_event()
        self._drop = driver.drop_event  # a module's names may be gone when the interpreter ends

    def __del__(self) -> None:
        if hasattr(self, "_drop"):
            self._drop(self._handle)

    def record(self, stream: Any) -> None:
        self._driver.record(self._handle, stream.cuda_stream)

    def query(self) -> bool:
        return self._driver.is_done(self._handle)

    def wait(self, stream: Any) -> None:
        """What `stream` is given from now on begins, on the device, when this is done."""
        self._driver.hold_back(stream.cuda_stream, self._handle)


@functools.cache
def cuda_driver(device: int) -> CudaDriver:
    """The `device`-th of those that the process sees. Raises `OSError` where there is no driver."""
    return CudaDriver(ctypes.PyDLL(_LIBRARY), ctypes.CDLL(_LIBRARY), device)

"""What CUDA's driver is called with, without a driver."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from phloem.kernels.cuda_driver import CudaDriver, CudaEvent
from tests.support.transfer import wait_until

CONTEXT, FIRST_EVENT, STREAM = 0xC0, 0xE0, 0x57
NOT_READY, ILLEGAL_ADDRESS = 600, 700


class _Call:
    argtypes: tuple[Any, ...] = ()

    def __init__(self, library: Library, name: str) -> None:
        self._library = library
        self._name = name

    def __call__(self, *arguments: Any) -> int:
        assert len(arguments) == len(self.argtypes)
        return self._library.called(self._name, arguments)


class Library:
    """Records calls by thread; `results` by name are what they return, nothing fails otherwise."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.threads: list[tuple[str, int]] = []
        self.results: dict[str, int] = {}
        self._num_events = 0

    def __getattr__(self, name: str) -> _Call:
        call = _Call(self, name)
        setattr(self, name, call)
        return call

    def called(self, name: str, arguments: tuple[Any, ...]) -> int:
        self.calls.append((name, arguments))
        self.threads.append((name, threading.get_ident()))
        if name == "cuDevicePrimaryCtxRetain":
            arguments[0]._obj.value = CONTEXT
        if name == "cuEventCreate":
            arguments[0]._obj.value = FIRST_EVENT + self._num_events
            self._num_events += 1
        if name == "cuGetErrorName":
            arguments[1]._obj.value = b"CUDA_ERROR_ILLEGAL_ADDRESS"
        return self.results.get(name, 0)

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture
def yielding() -> Library:
    return Library()


@pytest.fixture
def driver(library: Library, yielding: Library) -> CudaDriver:
    return CudaDriver(library, yielding, 3)


def stream() -> Any:
    return SimpleNamespace(cuda_stream=STREAM)


def test_each_thread_that_calls_enters_the_context_once(library: Library, driver: CudaDriver) -> None:
    events = [CudaEvent(driver) for _ in range(2)]
    looking = threading.Thread(target=lambda: [event.query() for event in events])
    looking.start()
    looking.join()
    assert library.named("cuDeviceGet")[0][1] == 3
    entered = [thread for name, thread in library.threads if name == "cuCtxSetCurrent"]
    assert len(entered) == len(set(entered)) == 2
    assert [context.value for (context,) in library.named("cuCtxSetCurrent")] == [CONTEXT] * 2


def test_event_is_recorded_and_waited_for_by_its_handle(library: Library, driver: CudaDriver) -> None:
    event = CudaEvent(driver)
    event.record(stream())
    event.wait(stream())
    assert library.named("cuEventRecord") == [(FIRST_EVENT, STREAM)]
    assert library.named("cuStreamWaitEvent") == [(STREAM, FIRST_EVENT, 0)]


def test_dropped_event_is_the_next_ones(library: Library, driver: CudaDriver) -> None:
    events = [CudaEvent(driver) for _ in range(3)]
    del events[1]
    gc.collect()
    events += [CudaEvent(driver), CudaEvent(driver)]
    for event in events:
        event.record(stream())
    assert [event for event, _ in library.named("cuEventRecord")] == [FIRST_EVENT + i for i in (0, 2, 1, 3)]
    assert len(library.named("cuEventCreate")) == 4 and not library.named("cuEventDestroy_v2")


def test_while_a_long_call_runs_all_calls_let_go_of_the_interpreter(
    library: Library, yielding: Library, driver: CudaDriver
) -> None:
    event = CudaEvent(driver)
    calls: list[Callable[[], object]] = [
        event.query,
        lambda: event.record(stream()),
        lambda: event.wait(stream()),
        lambda: CudaEvent(driver),
        lambda: driver.launch(1, 1, 32, 0, STREAM, None),
    ]
    first = driver.giving_way()
    with driver.giving_way():
        first.__enter__()
    for gives_way in (True, False):  # another one goes on when one has ended
        assert driver.gives_way == gives_way
        library.calls.clear()
        yielding.calls.clear()
        for call in calls:
            call()
        kept, let_go = len(library.calls), len(yielding.calls)
        assert (kept, let_go) == ((0, len(calls)) if gives_way else (len(calls) - 1, 0))  # one event is left
        if gives_way:
            first.__exit__(None, None, None)


def test_call_that_fails_gives_way_no_longer(driver: CudaDriver) -> None:
    with pytest.raises(OSError, match="NCCL"), driver.giving_way():
        raise OSError("NCCL")
    assert not driver.gives_way


@pytest.mark.parametrize(("result", "done"), [(0, True), (NOT_READY, False)])
def test_event_is_done_or_not_ready(library: Library, driver: CudaDriver, result: int, done: bool) -> None:
    library.results["cuEventQuery"] = result
    assert CudaEvent(driver).query() is done


@pytest.mark.parametrize("name", ["cuEventQuery", "cuEventRecord", "cuStreamWaitEvent", "cuLaunchKernel"])
def test_failure_is_told_by_its_name(library: Library, driver: CudaDriver, name: str) -> None:
    library.results[name] = ILLEGAL_ADDRESS
    event = CudaEvent(driver)
    calls: dict[str, Callable[[], object]] = {
        "cuEventQuery": event.query,
        "cuEventRecord": lambda: event.record(stream()),
        "cuStreamWaitEvent": lambda: event.wait(stream()),
        "cuLaunchKernel": lambda: driver.launch(1, 1, 32, 0, STREAM, None),
    }
    with pytest.raises(RuntimeError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        calls[name]()


def test_kernel_is_launched_with_its_arguments_addresses(library: Library, driver: CudaDriver) -> None:
    arguments = (ctypes.c_void_p * 1)(0x1000)
    driver.launch(0xF0, 99, 512, 128, STREAM, arguments)
    assert library.named("cuLaunchKernel") == [
        (0xF0, 99, 1, 1, 512, 1, 1, 128, STREAM, arguments, None),
    ]


def test_others_give_way_for_as_long_as_is_said(driver: CudaDriver) -> None:
    """NCCL may never return from making a channel; nobody holds a lock meanwhile."""
    with driver.giving_way(), driver.giving_way(at_most_s=0.01) as _:
        time.sleep(0.1)
        assert driver.gives_way  # for the other one
    with driver.giving_way(at_most_s=0.01):
        wait_until(lambda: not driver.gives_way, 10.0)
    assert not driver.gives_way

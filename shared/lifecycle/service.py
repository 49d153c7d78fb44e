"""The entry of every service process: event loop, logs, signals, exit code.

SIGTERM and SIGINT ask the service to stop. One that took `stop_event()` drains by itself when the event is
set; any other is cancelled. A second signal cancels in either case.

Exit codes: 0 stopped as asked, 1 a runtime error, 2 a configuration error. Errors that a user can cause are
one readable line, never a traceback.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from contextvars import ContextVar

import uvloop

from phloem.shared.errors import ConfigError, PhloemError
from phloem.shared.telemetry.logs import LogOptions, setup_logging

log = logging.getLogger(__name__)

EXIT_RUNTIME_ERROR = 1
EXIT_CONFIG_ERROR = 2
ERROR_PREFIX = "phloem: error: "  # of the line that says why a process ends

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _StopRequest:
    """Turns stop signals into an event or a cancellation of `task`."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task
        self._event: asyncio.Event | None = None
        self._num_signals = 0

    @property
    def requested(self) -> bool:
        return self._num_signals > 0

    def event(self) -> asyncio.Event:
        if self._event is None:
            self._event = asyncio.Event()
            if self.requested:
                self._event.set()
        return self._event

    def on_signal(self) -> None:
        self._num_signals += 1
        if self._event is None or self._num_signals > 1:
            self._task.cancel()
        else:
            self._event.set()


_current: ContextVar[_StopRequest | None] = ContextVar("phloem_stop_request", default=None)


def stop_event() -> asyncio.Event:
    """The event that the first SIGTERM or SIGINT sets; taking it promises to stop, in order, once it is set.

    Outside `run_service` (in a test) it is an event that nobody sets.
    """
    request = _current.get()
    return request.event() if request is not None else asyncio.Event()


def run_service(main: Callable[[], Awaitable[None]], *, service: str, logs: LogOptions | None = None) -> int:
    """Runs `main` on uvloop until it returns or a signal stops it; returns the process's exit code.

    `service` names the process in its logs.
    """
    setup_logging(service, logs or LogOptions())
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_supervised(main, service))
    except KeyboardInterrupt:  # a signal before the handlers stood
        return 128 + signal.SIGINT


async def _supervised(main: Callable[[], Awaitable[None]], service: str) -> int:
    async def body() -> None:
        await main()

    task = asyncio.create_task(_with_stop_request(body), name=service)
    try:
        await asyncio.wait({task})
    finally:
        task.cancel()
    if task.cancelled():
        return 0
    error = task.exception()
    return 0 if error is None else report_error(error)


async def _with_stop_request(body: Callable[[], Awaitable[None]]) -> None:
    task = asyncio.current_task()
    assert task is not None
    request = _StopRequest(task)
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, request.on_signal)
    token = _current.set(request)
    try:
        await body()
    finally:
        _current.reset(token)
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)


def report_error(error: BaseException) -> int:
    """Prints what ended the process and returns the exit code: one line for each typed error, a traceback
    for a bug of ours."""
    leaves = _leaves(error)
    typed = [leaf for leaf in leaves if isinstance(leaf, PhloemError)]
    if len(typed) != len(leaves):
        log.critical("unexpected error", exc_info=error)
        return EXIT_RUNTIME_ERROR
    for message in dict.fromkeys(str(leaf) for leaf in typed):
        print(f"{ERROR_PREFIX}{message}", file=sys.stderr, flush=True)
    return EXIT_CONFIG_ERROR if isinstance(typed[0], ConfigError) else EXIT_RUNTIME_ERROR


def _leaves(error: BaseException) -> list[BaseException]:
    """The errors that a task group collected, flat."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for child in error.exceptions for leaf in _leaves(child)]
    return [error]

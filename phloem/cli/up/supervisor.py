"""Runs the cluster's processes: starts them, starts again what dies, stops all of them in order.

Until `settle` a death is fatal: the cluster never came up, and the user is told why. After it, every child
is restarted with a growing delay, Valkey too: the services publish their state to an empty Valkey again.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from phloem.cli.up.child_log import ChildLog
from phloem.cli.up.plan import STOP_ORDER, ChildSpec, Kind
from phloem.cli.up.restart_policy import next_restart
from phloem.shared.errors import PhloemError
from phloem.shared.lifecycle.child_process import ChildProcess, spawn_child
from phloem.shared.lifecycle.service import ERROR_PREFIX, EXIT_CONFIG_ERROR

_TAIL_LINES = 12
_LAST_WORDS = 3  # lines: what is further up belongs to an earlier life of the child
_FIRST_TAIL_LINES = 25


class Child:
    """One supervised process and what is known about it."""

    def __init__(self, spec: ChildSpec, log: ChildLog) -> None:
        self.spec = spec
        self.log = log
        self.process: ChildProcess | None = None
        self.num_restarts = 0

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int | None:
        """None between a death and the next start."""
        return self.process.pid if self.process is not None else None


class Supervisor:
    """Owns the children. Use it as a context manager: leaving it stops them, in order and within bounds;
    when that is cancelled (a second Ctrl-C) it kills what is left."""

    def __init__(self, run_dir: Path, report: Callable[[str], None], stop_timeout_s: float) -> None:
        """`report` shows a line to the user; logs go to files in `run_dir`."""
        self.children: dict[str, Child] = {}
        self.run_dir = run_dir
        self._report = report
        self._stop_timeout_s = stop_timeout_s
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settled = False

    async def __aenter__(self) -> Supervisor:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self, spec: ChildSpec) -> Child:
        """Starts a process and watches it from now on."""
        child = Child(spec, ChildLog(self.run_dir / f"{spec.name}.log"))
        self.children[spec.name] = child
        await self._spawn(child)
        self._watchers[spec.name] = asyncio.create_task(self._watch(child), name=f"watch {spec.name}")
        return child

    def settle(self) -> None:
        """The cluster is up: from now on a death is repaired instead of fatal."""
        self._settled = True

    def kill(self, name: str, why: str) -> None:
        """Ends a child that runs, at once; what follows is as for one that died."""
        process = self.children[name].process
        if process is not None:
            self._report(f"{name} {why}: it is killed")
            process.kill()

    async def failure(self) -> None:
        """Waits for a child to die before `settle`, and raises `PhloemError` with the end of its log."""
        await asyncio.shield(self._failure)

    async def stop(self) -> None:
        """Stops all children, gateways first, Valkey last. When cancelled, kills them all at once."""
        for watcher in self._watchers.values():
            watcher.cancel()
        try:
            await asyncio.gather(*self._watchers.values(), return_exceptions=True)
            for kinds in STOP_ORDER:
                await self._stop_kinds(kinds)
        finally:
            for child in self.children.values():
                if child.process is not None:
                    child.process.kill()
            if self._failure.done() and not self._failure.cancelled():
                self._failure.exception()  # it was reported, or the user stopped first

    async def _stop_kinds(self, kinds: Iterable[Kind]) -> None:
        running = [child for child in self.children.values() if child.spec.kind in kinds]
        async with asyncio.TaskGroup() as group:
            for child in running:
                if child.process is not None and child.process.returncode is None:
                    group.create_task(self._stop_child(child.process))

    async def _stop_child(self, process: ChildProcess) -> None:
        started = time.monotonic()
        code = await process.stop(self._stop_timeout_s)
        if code == -signal.SIGKILL and time.monotonic() - started >= self._stop_timeout_s:
            self._report(f"{process.name} did not stop within {self._stop_timeout_s:g} s and was killed")

    async def _spawn(self, child: Child) -> None:
        child.log.path.touch(mode=0o600)
        with child.log.path.open("ab") as file:
            child.process = await spawn_child(
                child.name, child.spec.argv, env=child.spec.env, stdout=file.fileno(), stderr=file.fileno()
            )

    async def _watch(self, child: Child) -> None:
        """Waits for each death of the child and starts it again."""
        attempt = 0
        while True:
            assert child.process is not None
            started = time.monotonic()
            code = await child.process.wait()
            if not self._settled:
                self._fail(child, code)
                return
            self._report(obituary(child, code, _TAIL_LINES))
            if code == EXIT_CONFIG_ERROR:  # the same flags would be refused again
                self._report(f"{child.name} is not started again")
                return
            restart = next_restart(attempt, time.monotonic() - started)
            attempt = restart.attempt
            self._report(f"{child.name} starts again in {restart.delay_s:g} s")
            child.process = None
            await asyncio.sleep(restart.delay_s)
            await self._spawn(child)
            child.num_restarts += 1
            self._report(f"{child.name} started again (pid {child.pid})")

    def _fail(self, child: Child, code: int) -> None:
        if not self._failure.done():
            message = obituary(child, code, _FIRST_TAIL_LINES)
            self._failure.set_exception(PhloemError("start_failed", message))


def obituary(child: Child, code: int, num_lines: int) -> str:
    """What the child itself said was wrong; else how it died, and the end of its log."""
    lines = child.log.tail(num_lines)
    said = next((line for line in reversed(lines[-_LAST_WORDS:]) if line.startswith(ERROR_PREFIX)), None)
    if said is not None and code > 0:
        return f"{child.name}: {said.removeprefix(ERROR_PREFIX)} (its log: {child.log.path})"
    how = f"exited with code {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            how = f"was killed by {signal.Signals(-code).name}"
    tail = "".join(f"\n    {line}" for line in lines)
    return f"{child.name} {how}; the end of its log ({child.log.path}):{tail or ' (empty)'}"

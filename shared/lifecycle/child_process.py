"""A child process that can't outlive its parent, and is stopped within a bound."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence

from phloem.shared.lifecycle import exec_child


class ChildProcess:
    """A running child. Make it with `spawn_child`."""

    def __init__(self, name: str, process: Process, own_session: bool) -> None:
        self.name = name
        self._process = process
        self._own_session = own_session

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: killed by that signal."""
        return self._process.returncode

    @property
    def stdout(self) -> asyncio.StreamReader | None:
        """What the child prints, when it was spawned with `stdout=asyncio.subprocess.PIPE`."""
        return self._process.stdout

    async def wait(self) -> int:
        """Waits until it has exited; returns its code (negative: killed by that signal)."""
        return await self._process.wait()

    def terminate(self) -> None:
        """Sends SIGTERM to the child alone, which then stops its own children in order."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """Sends SIGKILL at once, to all of the child's process group when it leads one."""
        if self.returncode is None and self._own_session:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def stop(self, grace_s: float) -> int:
        """SIGTERM, up to `grace_s` seconds to exit, then SIGKILL. Returns the exit code.

        When the caller is cancelled meanwhile the child is killed at once.
        """
        self.terminate()
        try:
            async with asyncio.timeout(grace_s):
                return await self.wait()
        except TimeoutError:
            return await self._kill_and_reap()
        except asyncio.CancelledError:
            self.kill()
            raise

    async def _kill_and_reap(self) -> int:
        self.kill()
        return await self.wait()


async def spawn_child(
    name: str,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: int | None = asyncio.subprocess.DEVNULL,
    stdout: int | None = None,
    stderr: int | None = None,
    pass_fds: Sequence[int] = (),
    cwd: str | None = None,
    own_session: bool = True,
    death_signal: signal.Signals = signal.SIGKILL,
) -> ChildProcess:
    """Starts `argv` so that the kernel sends it `death_signal` when this process dies, however it dies.

    `env` is the whole environment (None: inherit). `own_session` puts the child into a session and process
    group of its own, so that a Ctrl-C on the terminal reaches only the parent. `stdin`, `stdout`, `stderr`
    are file descriptors or `asyncio.subprocess` constants (None: inherit).

    Must be called on the main thread: the death signal is bound to the *thread* that forks. Raises `OSError`
    when the interpreter can't be started; a program that can't be run exits with 127.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("children are spawned on the main thread: the parent-death signal is the thread's")
    wrapper = [sys.executable, "-I", "-S", exec_child.__file__, str(os.getpid()), str(int(death_signal))]
    process = await asyncio.create_subprocess_exec(
        *wrapper,
        *argv,
        env=dict(env) if env is not None else None,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=tuple(pass_fds),
        cwd=cwd,
        start_new_session=own_session,
    )
    return ChildProcess(name, process, own_session)

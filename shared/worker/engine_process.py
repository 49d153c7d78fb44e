"""The engine of a worker: a child process at the other end of a socket pair.

A frame is a 4-byte little-endian length and that many bytes of msgpack. The first one down is the
`EngineConfig`; then `EngineDown` go down and `EngineUp` come up. The engine dies with its front: the kernel
kills it (parent-death signal), and it exits by itself when its socket closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from phloem.shared.engine.config import EngineConfig, engine_config
from phloem.shared.errors import PhloemError
from phloem.shared.lifecycle.child_process import ChildProcess, spawn_child
from phloem.shared.protocol.codec import MAX_MESSAGE_BYTES
from phloem.shared.protocol.engine import EngineDown, EngineMessage, EngineUp, engine_down, engine_up

ENGINE_COMMAND = (sys.executable, "-m", "phloem.shared.engine.main")
LENGTH_BYTES = 4


def engine_died(message: str) -> PhloemError:
    """The engine is gone: whatever it held must be submitted to another worker."""
    return PhloemError("engine_died", message, retryable=True, http_status=503, retry_after_s=1.0)


class EngineProcess:
    """A running engine and its socket. Make it with `start`; `stop` or `kill` ends it."""

    def __init__(
        self, child: ChildProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._child = child
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        config: EngineConfig,
        env: Mapping[str, str],
        *,
        stderr: int | None = None,
    ) -> EngineProcess:
        """Spawns `command --fd N` and sends it `config`; its log goes to `stderr`, a descriptor (None: ours).
        Must be called on the main thread."""
        ours, theirs = socket.socketpair()
        try:
            child = await spawn_child(
                f"engine of {config.worker_id}",
                [*command, "--fd", str(theirs.fileno())],
                env=env,
                stderr=stderr,
                pass_fds=(theirs.fileno(),),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        self = cls(child, reader, writer)
        await self._write(engine_config.encode(config))
        return self

    @property
    def pid(self) -> int:
        return self._child.pid

    async def send(self, messages: list[EngineMessage]) -> None:
        """Sends `messages` as one frame; waits while the engine reads nothing.

        Raises `PhloemError` (`engine_died`).
        """
        await self._write(engine_down.encode(EngineDown(messages)))

    async def receive(self) -> EngineUp:
        """The next message of the engine. Raises `PhloemError` (`engine_died`) when there is none."""
        try:
            length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "little")
            if length > MAX_MESSAGE_BYTES:
                raise engine_died(f"the engine sent a frame of {length} bytes, over {MAX_MESSAGE_BYTES}")
            return engine_up.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise engine_died(await self._obituary()) from error

    def is_stopped(self) -> bool:
        """Whether the process is suspended (SIGSTOP, a debugger): alive for the kernel, dead for peers."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in ("T", "t")

    async def stop(self, grace_s: float) -> int:
        """Closes the socket, gives the engine `grace_s` seconds to exit, then kills it. Returns its code."""
        await self._close_socket()
        try:
            async with asyncio.timeout(grace_s):
                return await self._child.wait()
        except TimeoutError:
            return await self.kill()

    async def kill(self) -> int:
        """SIGKILL; returns when the process is reaped."""
        self._child.kill()
        await self._close_socket()
        return await self._child.wait()

    async def _write(self, payload: bytes) -> None:
        try:
            self._writer.write(len(payload).to_bytes(LENGTH_BYTES, "little") + payload)
            await self._writer.drain()
        except ConnectionError as error:
            raise engine_died(await self._obituary()) from error

    async def _obituary(self) -> str:
        """What became of the process whose socket closed."""
        try:
            async with asyncio.timeout(2.0):
                code = await self._child.wait()
        except TimeoutError:
            return "the engine closed its socket but still runs"
        if code < 0:
            return f"the engine process was killed by {signal.Signals(-code).name}"
        return f"the engine process exited with code {code}: see its log above"

    async def _close_socket(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

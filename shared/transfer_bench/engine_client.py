"""One engine process, driven as a worker's front drives it, but by a measurement."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from phloem.shared.block_hash import BlockHasher
from phloem.shared.engine.config import EngineConfig
from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.engine import (
    AuditReply,
    AuditRequest,
    EngineAbort,
    EngineMessage,
    EngineReady,
    EngineSubmit,
    EngineUp,
    FlushCache,
    PeerDown,
    PeerUp,
    Reply,
    StepReport,
    Stop,
)
from phloem.shared.protocol.session import PeerRef, Phase, SamplingParams, Submit
from phloem.shared.transfer_bench.streams import EngineStream
from phloem.shared.worker.engine_env import engine_environment
from phloem.shared.worker.engine_process import ENGINE_COMMAND, EngineProcess
from phloem.shared.worker.engine_start import wait_until_ready

START_TIMEOUT_S = 300.0
REPLY_TIMEOUT_S = 60.0
_STOP_GRACE_S = 10.0
_AUDIT_PAUSE_S = 0.02


class EngineClient:
    """A running engine; `start` makes it, `stop` or `kill` ends it."""

    def __init__(self, config: EngineConfig, process: EngineProcess, ready: EngineReady) -> None:
        self.ref = PeerRef(config.worker_id, config.epoch)
        self.ready = ready
        self._process = process
        self._hasher = BlockHasher(config.cluster_secret)
        self._streams: dict[str, EngineStream] = {}
        self._replies: dict[int, asyncio.Future[AuditReply | Reply]] = {}
        self._num_tags = 0
        self._gone: ErrorInfo | None = None
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, config: EngineConfig, gpu: int | None, log: Path) -> EngineClient:
        """Starts the process of a worker's engine, alone on the host's GPU number `gpu` (None: a CPU).

        Must be called on the main thread. Raises `PhloemError` when it does not come up: `log` says why.
        """
        visible = "" if gpu is None else str(gpu)
        order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}
        env = engine_environment(config.options.num_threads, {**os.environ, **order})
        with log.open("ab") as file:
            process = await EngineProcess.start(ENGINE_COMMAND, config, env, stderr=file.fileno())
        try:
            ready = await wait_until_ready(process, START_TIMEOUT_S)
        except BaseException:
            await process.kill()
            raise
        return cls(config, process, ready)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_gone(self) -> bool:
        return self._gone is not None

    async def submit(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        phase: Phase = "both",
        peer: PeerRef | None = None,
        salt: str = "",
        timeout_s: float = 600.0,
    ) -> EngineStream:
        """Raises `PhloemError` (`engine_died`)."""
        stream = self._streams[request_id] = EngineStream(request_id)
        await self._send(
            EngineSubmit(
                0,
                Submit(
                    request_id=request_id,
                    attempt=1,
                    epoch=self.ref.epoch,
                    phase=phase,
                    token_ids=list(token_ids),
                    num_prompt_tokens=len(token_ids),
                    sampling=sampling,
                    peer=peer,
                    block_hashes=self._hasher.chain(token_ids, salt),
                    cache_salt=salt,
                    timeout_s=timeout_s,
                ),
            )
        )
        return stream

    async def abort(self, request_id: str) -> None:
        await self._send(EngineAbort(request_id, 1))

    async def peer_up(self, peer: EngineClient) -> None:
        await self._send(PeerUp(peer.ref, peer.ready.transfer_address))

    async def peer_down(self, peer: PeerRef) -> None:
        await self._send(PeerDown(peer))

    async def flush(self) -> None:
        """Forgets every cached prefix."""
        await self._ask(FlushCache(self._tag()))

    async def audit(self) -> AuditReply:
        reply = await self._ask(AuditRequest(self._tag()))
        assert isinstance(reply, AuditReply)
        return reply

    async def audit_idle(self, timeout_s: float = 10.0) -> AuditReply:
        """The audit once no request is left. Raises `PhloemError` when one stays, or a page is not where it
        belongs."""
        deadline = time.monotonic() + timeout_s
        while (reply := await self.audit()).num_requests:
            if time.monotonic() > deadline:
                raise _unclean(self.ref, f"{reply.num_requests} requests are left after {timeout_s:.0f} s")
            await asyncio.sleep(_AUDIT_PAUSE_S)
        if reply.problems or reply.locked_nodes or reply.request_pages:
            raise _unclean(self.ref, f"{reply.problems}, {reply.locked_nodes} locked nodes")
        if reply.free_pages + reply.tree_pages != reply.total_pages:
            raise _unclean(self.ref, f"{reply.total_pages} pages, {reply.free_pages} free")
        return reply

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    async def kill(self) -> None:
        """SIGKILL; its open streams end as failed."""
        await self._process.kill()
        await self._close()

    async def stop(self) -> None:
        """Asks it to end; kills it when it does not."""
        with contextlib.suppress(PhloemError):
            await self._process.send([Stop()])
        await self._process.stop(_STOP_GRACE_S)
        await self._close()

    async def _close(self) -> None:
        await self._reading

    def _tag(self) -> int:
        self._num_tags += 1
        return self._num_tags

    async def _ask(self, message: AuditRequest | FlushCache) -> AuditReply | Reply:
        future: asyncio.Future[AuditReply | Reply] = asyncio.get_running_loop().create_future()
        self._replies[message.tag] = future
        try:
            await self._send(message)
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                return await future
        except TimeoutError as error:
            raise PhloemError("bench_timeout", f"{self.ref.worker_id} does not answer") from error
        finally:
            del self._replies[message.tag]

    async def _send(self, message: EngineMessage) -> None:
        if self._gone is not None:
            raise PhloemError.from_info(self._gone)
        await self._process.send([message])

    async def _read(self) -> None:
        try:
            while True:
                self._take(await self._process.receive(), time.monotonic())
        except PhloemError as error:
            self._lose(error.info)

    def _take(self, message: EngineUp, now_s: float) -> None:
        match message:
            case StepReport():
                for group in message.outputs:
                    for output in group.outputs:
                        self._streams[output.request_id].take(output, now_s)
            case AuditReply() | Reply():
                future = self._replies.get(message.tag)
                if future is not None and not future.done():
                    future.set_result(message)
            case _:
                raise PhloemError("bad_message", f"{self.ref.worker_id} said {type(message).__name__}")

    def _lose(self, error: ErrorInfo) -> None:
        self._gone = error
        for stream in self._streams.values():
            stream.break_off(error, time.monotonic())
        for future in self._replies.values():
            if not future.done():
                future.set_exception(PhloemError.from_info(error))


def _unclean(ref: PeerRef, what: str) -> PhloemError:
    return PhloemError("audit_failed", f"the audit of {ref.worker_id} is not clean: {what}")

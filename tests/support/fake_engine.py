"""An engine without a model: it speaks the front's frames and generates 1000, 1001, ... for every request.

Run as a program with `--fd N`, as the real one is. Each step makes one token for every running request.
"Prefill" makes the next token and hands over; "decode" goes on with the one after it; both "both".
A prompt that begins with `DIE_TOKEN` kills the process; `FAIL_TOKEN` makes it report a failure; one
that begins with `HANG_TOKEN` is never heard of again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
from collections import Counter

from phloem.shared.engine.config import EngineConfig, engine_config
from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.cluster import WorkerLoad
from phloem.shared.protocol.engine import (
    AbortGateway,
    AuditReply,
    AuditRequest,
    DumpTree,
    EngineAbort,
    EngineFailed,
    EngineMessage,
    EngineReady,
    EngineSubmit,
    EngineUp,
    FlushCache,
    GatewayOutputs,
    PeerDown,
    PeerUp,
    Progress,
    Reply,
    StepReport,
    Stop,
    TreeDump,
    engine_down,
    engine_up,
)
from phloem.shared.protocol.session import Ended, Output, Submit, TokensOut

FIRST_TOKEN = 1000
DIE_TOKEN = 666
FAIL_TOKEN = 667
HANG_TOKEN = 668


class Running:
    """One request: where it is and who asked."""

    def __init__(self, gateway: int, submit: Submit) -> None:
        self.gateway = gateway
        self.submit = submit
        generated = len(submit.token_ids) - submit.num_prompt_tokens
        self.next_index = generated + (1 if submit.phase == "decode" else 0)

    def step(self) -> list[Output]:
        """One more token, and the end when it is the last."""
        submit, index = self.submit, self.next_index
        self.next_index += 1
        last = self.next_index >= submit.sampling.max_tokens
        token = TokensOut(
            submit.request_id,
            submit.attempt,
            index,
            [FIRST_TOKEN + index],
            "length" if last else None,
            num_cached_tokens=3,
            timeline={"admitted": 0.5},
        )
        if last:
            return [token, Ended(submit.request_id, submit.attempt, "finished")]
        if submit.phase == "prefill":
            return [token, Ended(submit.request_id, submit.attempt, "handed_over")]
        return [token]


class FakeEngine:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, step_s: float) -> None:
        self._reader = reader
        self._writer = writer
        self._step_s = step_s
        self._running: dict[tuple[str, int], Running] = {}
        self._finished: list[GatewayOutputs] = []
        self._stored: list[bytes] = []
        self._removed: list[bytes] = []
        self._tree: dict[bytes, None] = {}
        self._counts: Counter[str] = Counter()
        self._step = 0
        self._work = asyncio.Event()

    async def run(self) -> None:
        config = engine_config.decode(await self._frame())
        self._send(Progress("weights", 1, 2))
        self._send(Progress("weights", 2, 2))
        self._send(self._ready(config))
        async with asyncio.TaskGroup() as tasks:
            stepping = tasks.create_task(self._steps())
            await self._messages()
            stepping.cancel()

    def _ready(self, config: EngineConfig) -> EngineReady:
        accepts = config.role != "prefill"
        return EngineReady(
            context_length=1000,
            page_size=16,
            num_pages=64,
            kv_layout="fake",
            kv_bytes_per_token=100,
            transfer_address="127.0.0.1:1" if accepts else "",
            device="cpu",
            max_running_requests=64,
        )

    async def _frame(self) -> bytes:
        length = int.from_bytes(await self._reader.readexactly(4), "little")
        return await self._reader.readexactly(length)

    def _send(self, message: EngineUp) -> None:
        payload = engine_up.encode(message)
        self._writer.write(len(payload).to_bytes(4, "little") + payload)

    async def _messages(self) -> None:
        while True:
            try:
                frame = engine_down.decode(await self._frame())
            except asyncio.IncompleteReadError:
                return
            self._counts["frames"] += 1
            for message in frame.messages:
                if isinstance(message, Stop):
                    return
                self._on_message(message)
            self._work.set()

    def _on_message(self, message: EngineMessage) -> None:
        self._counts[type(message).__name__] += 1
        match message:
            case EngineSubmit(gateway, submit):
                self._on_submit(gateway, submit)
            case EngineAbort(request_id, attempt):
                running = self._running.pop((request_id, attempt), None)
                if running is not None:
                    self._finish(running.gateway, Ended(request_id, attempt, "aborted"))
            case AbortGateway(gateway):
                self._running = {k: r for k, r in self._running.items() if r.gateway != gateway}
            case FlushCache(tag):
                self._removed += self._tree
                self._tree.clear()
                self._send(Reply(tag))
            case AuditRequest(tag):
                counters = dict(self._counts) | {
                    "pid": os.getpid(),
                    "steps": self._step,
                    "omp": int(os.environ["OMP_NUM_THREADS"]),
                }
                self._send(AuditReply(tag, [], 64, 64, 0, 0, len(self._running), 0, counters))
            case DumpTree(tag):
                self._send(TreeDump(tag, list(self._tree)))
            case PeerUp() | PeerDown() | Stop():
                pass

    def _on_submit(self, gateway: int, submit: Submit) -> None:
        if submit.token_ids[0] == DIE_TOKEN:
            os._exit(3)
        if submit.token_ids[0] == FAIL_TOKEN:
            self._send(EngineFailed(ErrorInfo("out_of_memory", "the device is out of memory")))
            return
        if submit.token_ids[0] == HANG_TOKEN:
            return
        self._running[(submit.request_id, submit.attempt)] = Running(gateway, submit)
        new = [block for block in submit.block_hashes if block not in self._tree]
        self._tree.update(dict.fromkeys(new))
        self._stored += new

    def _finish(self, gateway: int, ended: Ended) -> None:
        self._finished.append(GatewayOutputs(gateway, [ended]))

    async def _steps(self) -> None:
        while True:
            await self._work.wait()
            await asyncio.sleep(self._step_s)
            self._report()
            if not self._running:
                self._work.clear()

    def _report(self) -> None:
        by_gateway: dict[int, list[Output]] = {}
        for part in self._finished:
            by_gateway.setdefault(part.gateway, []).extend(part.outputs)
        for key, running in list(self._running.items()):
            outputs = running.step()
            by_gateway.setdefault(running.gateway, []).extend(outputs)
            if isinstance(outputs[-1], Ended):
                del self._running[key]
        if not by_gateway and not self._stored and not self._removed:
            return
        self._step += 1
        self._send(
            StepReport(
                self._step,
                [GatewayOutputs(gateway, outputs) for gateway, outputs in by_gateway.items()],
                self._stored,
                self._removed,
                WorkerLoad(num_running=len(self._running), free_pages=60, total_pages=64),
            )
        )
        self._finished, self._stored, self._removed = [], [], []


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--step-s", type=float, default=0.002)
    options = parser.parse_args()
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=options.fd))
    await FakeEngine(reader, writer, options.step_s).run()
    writer.close()


if __name__ == "__main__":
    asyncio.run(main())
    sys.exit(0)

"""Engine processes that one measurement starts, joins, and ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from phloem.shared.engine.config import EngineConfig, EngineOptions
from phloem.shared.engine.fault_injection import Faults
from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.cluster import Role
from phloem.shared.protocol.session import SamplingParams
from phloem.shared.transfer_bench.engine_client import EngineClient
from phloem.shared.transfer_bench.streams import EngineStream

HOST = "127.0.0.1"
_SECRET = b"phloem transfer bench"
HAND_OVER_TIMEOUT_S = 120.0
# Ten processes that make their CUDA contexts at once hold the driver up for seconds, for all others.
STARTS_AT_ONCE = 4


class HandOver(NamedTuple):
    """One request at both engines."""

    prefill: EngineStream
    decode: EngineStream

    @property
    def token_ids(self) -> list[int]:
        return self.prefill.token_ids + self.decode.token_ids

    @property
    def is_complete(self) -> bool:
        """All tokens are there: decode made the last one, or token 0 was the last."""
        return self.prefill.reason == "finished" or (
            (self.prefill.reason, self.decode.reason) == ("handed_over", "finished")
        )

    @property
    def error(self) -> ErrorInfo | None:
        return self.decode.error or self.prefill.error

    async def until_end(self, timeout_s: float = HAND_OVER_TIMEOUT_S) -> None:
        """Until both engines are done with it, however it ends."""
        await self.prefill.until_end(timeout_s)
        await self.decode.until_end(timeout_s)

    async def completed(self, timeout_s: float = HAND_OVER_TIMEOUT_S) -> list[int]:
        """All tokens. Raises `PhloemError` when it does not end well."""
        await self.until_end(timeout_s)
        if not self.is_complete:
            raise _failed(self.prefill.request_id, self.error, f"{self.prefill.reason}, {self.decode.reason}")
        return self.token_ids


@dataclass
class Lab:
    """`options` are of every engine that is started here, but for what `start` changes; their logs go to
    `log_dir`, one file each."""

    options: EngineOptions
    log_dir: Path
    engines: list[EngineClient] = field(default_factory=list)
    num_started: int = 0

    def __post_init__(self) -> None:
        self._starts = asyncio.Semaphore(STARTS_AT_ONCE)

    async def start(
        self,
        role: Role,
        gpu: int | None = None,
        *,
        name: str = "",
        faults: Faults | None = None,
        changes: Mapping[str, object] | None = None,
    ) -> EngineClient:
        """An engine that serves, on GPU number `gpu` of the host or a CPU (None). Its epoch is newer than
        those of all started before; `changes` are to the options."""
        self.num_started += 1
        epoch = self.num_started
        name = name or f"{role}-{epoch}"
        config = EngineConfig(
            worker_id=name,
            epoch=epoch,
            role=role,
            host=HOST,
            cluster_secret=_SECRET,
            options=msgspec.structs.replace(
                self.options, device="cpu" if gpu is None else "cuda:0", **(changes or {})
            ),
            faults=faults or Faults(),
        )
        async with self._starts:
            engine = await EngineClient.start(config, gpu, self.log_dir / f"{name}.log")
        self.engines.append(engine)
        return engine

    async def kill(self, engine: EngineClient) -> None:
        self.engines.remove(engine)
        await engine.kill()

    async def close(self) -> None:
        """Ends all that still run, at once: each may take seconds."""
        engines, self.engines = self.engines, []
        await asyncio.gather(*(engine.kill() if engine.is_gone else engine.stop() for engine in engines))


@asynccontextmanager
async def open_lab(options: EngineOptions, log_dir: Path) -> AsyncIterator[Lab]:
    """A lab whose engines end with the block."""
    lab = Lab(options, log_dir)
    try:
        yield lab
    finally:
        await lab.close()


async def hand_over(
    prefill: EngineClient,
    decode: EngineClient,
    request_id: str,
    token_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    timeout_s: float = HAND_OVER_TIMEOUT_S,
) -> HandOver:
    """Submits to both at once, as a gateway does."""
    received = await decode.submit(
        request_id, token_ids, sampling, phase="decode", peer=prefill.ref, timeout_s=timeout_s
    )
    sent = await prefill.submit(
        request_id, token_ids, sampling, phase="prefill", peer=decode.ref, timeout_s=timeout_s
    )
    return HandOver(sent, received)


async def whole(
    engine: EngineClient, request_id: str, token_ids: Sequence[int], sampling: SamplingParams
) -> list[int]:
    """Both phases on one engine: all its tokens. Raises `PhloemError` when it does not end well."""
    stream = await engine.submit(request_id, token_ids, sampling)
    await stream.until_end(HAND_OVER_TIMEOUT_S)
    if stream.reason != "finished":
        raise _failed(request_id, stream.error, str(stream.reason))
    return stream.token_ids


async def prove_channel(prefill: EngineClient, decode: EngineClient, request_id: str) -> None:
    """Returns once a request has gone from `prefill` to `decode`, which dials anew meanwhile."""
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    await (await hand_over(prefill, decode, request_id, [7] * 24, sampling)).completed()


def _failed(request_id: str, error: ErrorInfo | None, how: str) -> PhloemError:
    why = f"{error.code}: {error.message}" if error is not None else how
    return PhloemError("bench_failed", f"{request_id} failed: {why}")

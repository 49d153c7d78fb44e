"""Controller <-> client process: length-prefixed MessagePack frames over a socket pair."""

from __future__ import annotations

import asyncio
from typing import Literal, TypeAlias

import msgspec

from phloem.shared.bench.record import RequestRecord
from phloem.shared.bench.session import Session
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.codec import Codec

ApiName: TypeAlias = Literal["completions", "chat", "generate"]

_LENGTH_BYTES = 4
_MAX_FRAME_BYTES = 64 * 1024 * 1024


class TargetSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A server and how to speak to it.

    `headers` are extra lines (authorization among them). `extra_body` are JSON members without braces.
    `ask_usage` and `ask_chunk_usage` set `stream_options.include_usage` and `.continuous_usage_stats`.
    """

    name: str
    url: str
    api: ApiName
    model: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    extra_body: bytes = b""
    temperature: float = 0.0
    ignore_eos: bool = True
    ask_usage: bool = True
    ask_chunk_usage: bool = True


class Setup(msgspec.Struct, frozen=True, tag="setup", kw_only=True):
    """First message: what holds for the whole run."""

    targets: tuple[TargetSpec, ...]
    timeout_s: float
    keep_pieces: bool


class StartBlock(msgspec.Struct, frozen=True, tag="start", kw_only=True):
    """Load one target. Sessions with `start_s` >= 0 start then (open loop), with at most `concurrency` in
    flight if that is not 0; the others fill `concurrency` places (closed loop), which open from
    `initial_concurrency` to `concurrency` over `ramp_s`. After `duration_s` (0: no limit) nothing new is
    sent. Nothing is sent before `Begin`.
    """

    block: int
    target: int
    concurrency: int = 0
    initial_concurrency: int = 0
    ramp_s: float = 0.0
    duration_s: float = 0.0
    is_warmup: bool = False


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """The block starts at `start_at` on the machine's monotonic clock."""

    block: int
    start_at: float


class SessionBatch(msgspec.Struct, frozen=True, tag="sessions"):
    """More sessions of a block, in the order of sending; answered by one `Credit` once all were begun."""

    block: int
    sessions: list[Session]
    is_last: bool


class StopBlocks(msgspec.Struct, frozen=True, tag="stop"):
    """Begin nothing new; what is in flight ends by itself, or is given up when `abort` is set."""

    abort: bool = False


ClientDown: TypeAlias = Setup | StartBlock | Begin | SessionBatch | StopBlocks


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The answer to `Setup`."""


class Credit(msgspec.Struct, frozen=True, tag="credit"):
    block: int


class Tick(msgspec.Struct, frozen=True, tag="tick", kw_only=True):
    """Progress since the process started, a few times a second. `lag_ms` is the worst since the last tick."""

    sent: int
    succeeded: int
    failed: int
    in_flight: int
    tokens: int
    lag_ms: float


class Records(msgspec.Struct, frozen=True, tag="records"):
    records: list[RequestRecord]


class LagSamples(msgspec.Struct, frozen=True, kw_only=True):
    """How late the client was, in seconds, as float64: `loop` a timer's callback, `spans` how long it was
    busy with reads that came together (the last of them was stamped at most so late), `dispatch` a request
    of the open loop against its schedule. `cpu_s` of `wall_s` it computed, at
    `priority`."""

    loop: bytes = b""
    spans: bytes = b""
    dispatch: bytes = b""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    priority: str = ""


class BlockDone(msgspec.Struct, frozen=True, tag="done"):
    """All requests of the block have ended and their records were sent."""

    block: int
    lag: LagSamples


ClientUp: TypeAlias = Ready | Credit | Tick | Records | BlockDone

client_down: Codec[ClientDown] = Codec(ClientDown, max_bytes=_MAX_FRAME_BYTES)
client_up: Codec[ClientUp] = Codec(ClientUp, max_bytes=_MAX_FRAME_BYTES)


def frame(data: bytes) -> bytes:
    """The message with its length before it."""
    return len(data).to_bytes(_LENGTH_BYTES, "little") + data


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """The next message; None at the end of the stream. Raises `PhloemError` when it ends inside one."""
    try:
        size = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "little")
        if size > _MAX_FRAME_BYTES:
            raise PhloemError("bad_frame", f"a frame of {size} bytes is over {_MAX_FRAME_BYTES}")
        return await reader.readexactly(size)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise PhloemError("bad_frame", "the stream ended inside a frame") from error
        return None

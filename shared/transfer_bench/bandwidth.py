"""Bandwidth from paged KV to paged KV, beside plain sends of the same bytes, in one run.

Two processes, one device each. For each size four things are timed in turn, several rounds long:

    raw, one by one      one message in one piece, from its posting to its arrival; then the next
    raw, ahead           all posted at once
    pages, one by one    a request's pages from decode's go-ahead until they lie checked in decode's pool
    pages, ahead         all requests may go at once

Both ways use the same backend, the same bound on NCCL's CTAs and the same clock.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import msgspec

from phloem.shared.errors import PhloemError
from phloem.shared.lifecycle import exec_child
from phloem.shared.transfer.events import Side
from phloem.shared.transfer_bench.rank_protocol import (
    CheckContent,
    Content,
    Joined,
    KvShape,
    Listening,
    PagesRun,
    RankDown,
    RankFailed,
    RankSetup,
    RawRun,
    Times,
    rank_down,
    rank_up,
)
from phloem.shared.worker.engine_env import engine_environment

Message = TypeVar("Message", Listening, Joined, Times, Content)

_START_TIMEOUT_S = 180.0
_RUN_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 10.0


class BandwidthPlan(msgspec.Struct, frozen=True, kw_only=True):
    """`gpus` are the host's numbers of the prefill and the decode rank's GPU; none: two CPU processes. Zero
    for staging or CTAs: the product's defaults. At most `ahead_bytes` are under way at once."""

    sizes: tuple[int, ...]
    shape: KvShape
    gpus: tuple[int, int] | None = None
    staging_bytes: int = 0
    staging_slots: int = 0
    max_ctas: int = 0
    repeats: int = 4
    rounds: int = 5
    ahead_bytes: int = 2**31
    log: Path = Path(os.devnull)


class SizeResult(msgspec.Struct, frozen=True, kw_only=True):
    """GB/s (10^9 bytes), medians. Pages are None where a page is larger than the size, and `num_bytes` is
    what whole pages make of the size otherwise. Ratios are medians of those of each round."""

    num_bytes: int
    raw: float
    raw_ahead: float
    pages: float | None = None
    pages_ahead: float | None = None
    ratio: float | None = None
    ratio_ahead: float | None = None


class BandwidthReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured between which devices."""

    device: str
    shape: KvShape
    page_bytes: int
    staging_bytes: int
    staging_slots: int
    max_ctas: int
    sizes: list[SizeResult]


def measure_bandwidth(plan: BandwidthPlan, tell: Callable[[str], None]) -> BandwidthReport:
    """Starts both ranks, measures, ends them. Raises `PhloemError` when one fails, or when what arrived is
    not what was sent."""
    with _running("decode", plan) as decode, _running("prefill", plan) as prefill:
        pair = _RankPair(prefill, decode)
        joined = pair.join(plan)
        results = []
        for size in plan.sizes:
            tell(f"{size / 2**20:.0f} MiB")
            results.append(_measure_size(pair, plan, joined.page_bytes, size))
        return BandwidthReport(
            device=joined.device_name,
            shape=plan.shape,
            page_bytes=joined.page_bytes,
            staging_bytes=joined.staging_bytes,
            staging_slots=joined.staging_slots,
            max_ctas=joined.max_ctas,
            sizes=results,
        )


def _measure_size(pair: _RankPair, plan: BandwidthPlan, page_bytes: int, size: int) -> SizeResult:
    pages = size // page_bytes
    num_bytes = pages * page_bytes if pages else size
    ahead = max(1, min(16, plan.ahead_bytes // num_bytes))
    ways: dict[str, RawRun | PagesRun] = {
        "raw": RawRun(num_bytes, plan.repeats, False),
        "raw_ahead": RawRun(num_bytes, ahead, True),
    }
    if pages:
        ways["pages"] = PagesRun(pages, plan.repeats, False)
        ways["pages_ahead"] = PagesRun(pages, ahead, True)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(plan.rounds + 1):
        for way in list(ways)[:: 1 if number % 2 else -1]:
            took_s = pair.seconds(ways[way])
            if number:  # the first round warms up
                seconds[way].append(took_s)
    if pages:
        pair.check_content()
    return _size_result(num_bytes, seconds)


def _size_result(num_bytes: int, seconds: dict[str, list[float]]) -> SizeResult:
    """`seconds` are per message, one value a round."""

    def rate(way: str) -> float | None:
        values = seconds.get(way)
        return num_bytes / 1e9 / statistics.median(values) if values else None

    def ratio(pages: str, raw: str) -> float | None:
        if pages not in seconds:
            return None
        return statistics.median(a / b for a, b in zip(seconds[raw], seconds[pages], strict=True))

    raw, raw_ahead = rate("raw"), rate("raw_ahead")
    assert raw is not None and raw_ahead is not None
    return SizeResult(
        num_bytes=num_bytes,
        raw=raw,
        raw_ahead=raw_ahead,
        pages=rate("pages"),
        pages_ahead=rate("pages_ahead"),
        ratio=ratio("pages", "raw"),
        ratio_ahead=ratio("pages_ahead", "raw_ahead"),
    )


class _RankPair:
    def __init__(self, prefill: Connection, decode: Connection) -> None:
        self._prefill = prefill
        self._decode = decode

    def join(self, plan: BandwidthPlan) -> Joined:
        self._say(self._decode, _setup("decode", plan, None))
        listening = self._hear(self._decode, Listening, _START_TIMEOUT_S)
        self._say(self._prefill, _setup("prefill", plan, listening))
        self._hear(self._prefill, Joined, _START_TIMEOUT_S)
        return self._hear(self._decode, Joined, _START_TIMEOUT_S)

    def seconds(self, work: RawRun | PagesRun) -> float:
        """Per message: the median of single ones, the mean of those that went together."""
        self._say(self._decode, work)
        self._say(self._prefill, work)
        began = self._hear(self._prefill, Times, _RUN_TIMEOUT_S).at_s
        there = self._hear(self._decode, Times, _RUN_TIMEOUT_S).at_s
        took = [end - start for start, end in zip(began, there, strict=True)]
        return took[0] / work.count if work.ahead else statistics.median(took)

    def check_content(self) -> None:
        for pipe in (self._prefill, self._decode):
            self._say(pipe, CheckContent())
        sent = self._hear(self._prefill, Content, _RUN_TIMEOUT_S)
        received = self._hear(self._decode, Content, _RUN_TIMEOUT_S)
        if sent != received:
            raise PhloemError("not_equal", "the pages that arrived are not those that were sent")

    @staticmethod
    def _say(pipe: Connection, message: RankDown) -> None:
        try:
            pipe.send_bytes(rank_down.encode(message))
        except OSError as error:
            raise PhloemError("bench_failed", f"a rank is gone: {error}") from error

    @staticmethod
    def _hear(pipe: Connection, kind: type[Message], timeout_s: float) -> Message:
        """The rank's next message, which must be of this kind."""
        if not pipe.poll(timeout_s):
            raise PhloemError("bench_timeout", f"a rank says nothing for {timeout_s:.0f} s")
        try:
            message = rank_up.decode(pipe.recv_bytes())
        except (EOFError, OSError) as error:
            raise PhloemError("bench_failed", "a rank ended early: its log says why") from error
        if isinstance(message, RankFailed):
            raise PhloemError.from_info(message.error)
        if not isinstance(message, kind):
            raise PhloemError("bad_message", f"a rank said {type(message).__name__}")
        return message


def _setup(side: Side, plan: BandwidthPlan, listening: Listening | None) -> RankSetup:
    """The pool holds all that is under way at once, and the largest size."""
    kv_bytes = _page_bytes(plan.shape)
    largest = max(plan.sizes)
    pages = max(largest, min(plan.ahead_bytes, 16 * largest)) // kv_bytes + 1
    return RankSetup(
        side=side,
        device="cpu" if plan.gpus is None else "cuda:0",
        shape=plan.shape,
        pool_pages=pages,
        message_bytes=largest,
        staging_bytes=plan.staging_bytes,
        staging_slots=plan.staging_slots,
        max_ctas=plan.max_ctas,
        transfer_address=listening.transfer_address if listening is not None else "",
        raw_port=listening.raw_port if listening is not None else 0,
    )


def _page_bytes(shape: KvShape) -> int:
    item = {"bfloat16": 2, "float16": 2, "float32": 4}[shape.dtype]
    return 2 * shape.num_layers * shape.page_size * shape.num_kv_heads * shape.head_dim * item


@contextmanager
def _running(side: Side, plan: BandwidthPlan) -> Iterator[Connection]:
    """A rank's process, which dies with this one."""
    ours, theirs = socket.socketpair()
    visible = "" if plan.gpus is None else str(plan.gpus[side == "decode"])
    device = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}
    env = engine_environment(0, {**os.environ, **device})
    command = [sys.executable, "-I", "-S", exec_child.__file__, str(os.getpid()), "9"]
    command += [sys.executable, "-m", "phloem.shared.transfer_bench.rank", "--fd", str(theirs.fileno())]
    with theirs, plan.log.open("ab") as log:
        process = subprocess.Popen(command, env=env, stderr=log, pass_fds=(theirs.fileno(),))
    pipe = Connection(ours.detach())
    try:
        yield pipe
    finally:
        pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
        process.kill()
        process.wait()

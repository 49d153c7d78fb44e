"""The result of a run as it is written to JSON, and read again to compare."""

from __future__ import annotations

import gzip
from array import array
from pathlib import Path
from typing import Any

import msgspec

from phloem.shared.bench.environment import Environment
from phloem.shared.bench.lag_report import LagReport
from phloem.shared.bench.options import RunOptions
from phloem.shared.bench.output_path import write_output
from phloem.shared.bench.rate_search import Trial
from phloem.shared.bench.record import RequestRecord
from phloem.shared.errors import ConfigError

FORMAT = "phloem-bench/1"


class SavedRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request. `sent_s` and `scheduled_s` count from the start of the first block; `chunk_ms` are the
    arrivals of chunks after sending, `chunk_tokens` the tokens in each (missing: unknown). Counts that
    nobody gave are missing."""

    id: str
    block: int
    session: int
    turn: int
    sent_s: float
    scheduled_s: float
    e2e_ms: float
    max_tokens: int
    ttft_ms: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    chunk_ms: list[float] = []
    chunk_tokens: list[int] = []
    finish_reason: str = ""
    status: int = 0
    error: str = ""
    connect_ms: float = 0.0
    resent: bool = False
    text: str | None = None

    def record(self, target: int) -> RequestRecord:
        """As the figures take it."""
        return RequestRecord(
            target=target,
            block=self.block,
            session=self.session,
            turn=self.turn,
            sent_s=self.sent_s,
            ended_s=self.sent_s + self.e2e_ms / 1e3,
            scheduled_s=self.scheduled_s,
            max_tokens=self.max_tokens,
            prompt_tokens=_or_unknown(self.prompt_tokens),
            output_tokens=_or_unknown(self.output_tokens),
            cached_tokens=_or_unknown(self.cached_tokens),
            chunk_offsets=array("d", [offset / 1e3 for offset in self.chunk_ms]).tobytes(),
            chunk_tokens=array("I", self.chunk_tokens).tobytes(),
            finish_reason=self.finish_reason,
            status=self.status,
            error=self.error,
            resent=self.resent,
        )


class Block(msgspec.Struct, frozen=True):
    """One uninterrupted load on one target."""

    index: int
    started_s: float
    duration_s: float


class TargetResult(msgspec.Struct, frozen=True, kw_only=True):
    """`figures` have the names of SGLang's bench_serving and more; `trials` are those of --find-rate."""

    name: str
    url: str
    api: str
    model: str
    server: dict[str, Any]  # Any: the server's own JSON about itself
    refused: tuple[str, ...]
    blocks: list[Block]
    figures: dict[str, float | int | str | None]
    records: list[SavedRecord]
    trials: list[Trial] = []
    found_rate: float | None = None


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run. `problems` make it invalid, `remarks` don't. `workload` names dataset, seed and lengths:
    equal ones were asked the same."""

    format: str = FORMAT
    started_at: str
    command: list[str]
    environment: Environment
    options: RunOptions
    workload: str
    is_valid: bool
    is_interrupted: bool
    problems: list[str]
    remarks: list[str]
    lag: LagReport
    targets: list[TargetResult]


def save_record(record: RequestRecord, epoch_s: float, *, with_text: bool) -> SavedRecord:
    """Times to the microsecond."""
    offsets = [round(offset * 1e3, 3) for offset in record.offsets()]
    return SavedRecord(
        id=f"bench-{record.block}-{record.session}-{record.turn}",
        block=record.block,
        session=record.session,
        turn=record.turn,
        sent_s=round(record.sent_s - epoch_s, 6),
        scheduled_s=round(record.scheduled_s - epoch_s, 6),
        e2e_ms=round(record.e2e_s * 1e3, 3),
        max_tokens=record.max_tokens,
        ttft_ms=offsets[0] if record.succeeded else None,
        prompt_tokens=_or_missing(record.prompt_tokens),
        output_tokens=_or_missing(record.output_tokens),
        cached_tokens=_or_missing(record.cached_tokens),
        chunk_ms=offsets,
        chunk_tokens=list(record.tokens()),
        finish_reason=record.finish_reason,
        status=record.status,
        error=record.error,
        connect_ms=round(record.connect_s * 1e3, 3),
        resent=record.resent,
        text="".join(record.pieces) if with_text else None,
    )


def write_result(result: RunResult, path: Path) -> None:
    """As JSON, gzipped when the name ends in .gz. Raises `ConfigError` when it can't be written."""
    data = msgspec.json.encode(result)
    write_output(path, gzip.compress(data, 6) if path.suffix == ".gz" else data)


def read_result(path: Path) -> RunResult:
    """Raises `ConfigError` for what `write_result` didn't write."""
    try:
        data = path.read_bytes()
        result = msgspec.json.decode(gzip.decompress(data) if path.suffix == ".gz" else data, type=RunResult)
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror or error}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not a result of `phloem bench serve`: {error}") from error
    if result.format != FORMAT:
        raise ConfigError(f"{path} has the format {result.format}, this version reads {FORMAT}")
    return result


def _or_missing(count: int) -> int | None:
    return None if count < 0 else count


def _or_unknown(count: int | None) -> int:
    return -1 if count is None else count

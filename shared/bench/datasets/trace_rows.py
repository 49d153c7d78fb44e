"""The rows of recorded workloads: Mooncake's (FAST'25) and Azure's (2023) trace formats."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from phloem.shared.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512


class TraceRow(NamedTuple):
    """One request: when it came (seconds of the trace), how long it is in tokens, and the
    names of its prompt's blocks of 512 tokens where the trace knows them."""

    at_s: float
    num_input: int
    num_output: int
    hash_ids: list[int] | None


class _MooncakeLine(msgspec.Struct):
    timestamp: float  # ms
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def trace_rows(path: Path) -> Iterator[TraceRow]:
    """A trace in either format, told by its first character: Mooncake's are JSON lines, Azure's CSV.

    Raises `ConfigError` for a row that can't be read, `OSError` for a file that can't.
    """
    with path.open("rb") as file:
        is_json = file.read(1) == b"{"
    return mooncake_rows(path) if is_json else azure_rows(path)


def mooncake_rows(path: Path) -> Iterator[TraceRow]:
    """One request per line; equal hash ids are equal content at equal places. Raises `ConfigError` with the
    line."""
    decoder = msgspec.json.Decoder(_MooncakeLine)
    with path.open("rb") as lines:
        for index, line in enumerate(lines):
            try:
                row = decoder.decode(line)
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path}, line {index + 1}: {error}") from error
            yield TraceRow(row.timestamp / 1e3, row.input_length, row.output_length, row.hash_ids)


def azure_rows(path: Path) -> Iterator[TraceRow]:
    """One request per row; the trace knows lengths and times only. Raises `ConfigError` with the row."""
    first: datetime | None = None
    with path.open(encoding="utf-8", newline="") as rows:
        for index, row in enumerate(csv.DictReader(rows)):
            try:
                at = datetime.fromisoformat(row["TIMESTAMP"])
                num_input, num_output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (KeyError, ValueError) as error:
                raise ConfigError(f"{path}, row {index + 1}: {error!r}") from error
            first = first or at
            yield TraceRow((at - first).total_seconds(), num_input, num_output, None)

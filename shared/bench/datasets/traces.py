"""Recorded workloads: Mooncake's (FAST'25) and Azure's (2023) trace formats."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache

import msgspec

from phloem.shared.bench.datasets.options import DatasetOptions, session_rng
from phloem.shared.bench.prompt_source import Piece, PromptSource
from phloem.shared.bench.session import Session, Turn, join_pieces
from phloem.shared.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512
_BLOCKS_KEPT = 4096


class _MooncakeRow(msgspec.Struct):
    timestamp: float  # ms
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def trace_sessions(options: DatasetOptions, source: PromptSource, seed: int) -> Iterator[Session]:
    """A trace in either format, told by its first character: Mooncake's are JSON lines, Azure's CSV."""
    with options.required_path().open("rb") as file:
        is_json = file.read(1) == b"{"
    return (mooncake_sessions if is_json else azure_sessions)(options, source, seed)


def mooncake_sessions(options: DatasetOptions, source: PromptSource, seed: int) -> Iterator[Session]:
    """One request per line. A hash id stands for one fixed block of 512 random tokens, so that equal ids
    are equal content at equal places; the last block of a prompt is cut to its length.

    Requests over `max_input_tokens` are left out. Raises `ConfigError` for a line that can't be read.
    """
    path = options.required_path()
    blocks = _Blocks(source, seed)
    decoder = msgspec.json.Decoder(_MooncakeRow)
    with path.open("rb") as lines:
        for index, line in enumerate(lines):
            try:
                row = decoder.decode(line)
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path}, line {index + 1}: {error}") from error
            if not options.fits(row.input_length):
                continue
            pieces = list(blocks.prompt(row.hash_ids, row.input_length, index))
            rng = session_rng(seed, "mooncake", index)
            turn = Turn(
                added=join_pieces(source.kind, [piece.json for piece in pieces]),
                max_tokens=options.output_tokens(rng, row.output_length),
                num_added_tokens=sum(p.num_tokens for p in pieces)
                if all(p.num_tokens for p in pieces)
                else 0,
            )
            yield Session(index, source.kind, (turn,), row.timestamp / 1e3 * options.time_scale)


def azure_sessions(options: DatasetOptions, source: PromptSource, seed: int) -> Iterator[Session]:
    """One request per row; the trace knows lengths and times only, so prompts share nothing.

    Requests over `max_input_tokens` are left out. Raises `ConfigError` for a row that can't be read.
    """
    path = options.required_path()
    first: datetime | None = None
    with path.open(encoding="utf-8", newline="") as rows:
        for index, row in enumerate(csv.DictReader(rows)):
            try:
                at = datetime.fromisoformat(row["TIMESTAMP"])
                num_input, num_output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (KeyError, ValueError) as error:
                raise ConfigError(f"{path}, row {index + 1}: {error!r}") from error
            first = first or at
            if not options.fits(num_input):
                continue
            rng = session_rng(seed, "azure", index)
            piece = source.make(rng, max(num_input, 1))
            turn = Turn(piece.json, options.output_tokens(rng, num_output), piece.num_tokens)
            yield Session(index, source.kind, (turn,), (at - first).total_seconds() * options.time_scale)


class _Blocks:
    """Content by hash id; recently used blocks are kept."""

    def __init__(self, source: PromptSource, seed: int) -> None:
        self._source = source
        self._seed = seed
        self.block = lru_cache(maxsize=_BLOCKS_KEPT)(self._make)

    def prompt(self, hash_ids: list[int], num_tokens: int, index: int) -> Iterator[Piece]:
        """The blocks of a prompt; what the ids don't cover is content of its own."""
        left = num_tokens
        for hash_id in hash_ids:
            if left <= 0:
                return
            yield self.block(hash_id, min(left, MOONCAKE_BLOCK_TOKENS))
            left -= MOONCAKE_BLOCK_TOKENS
        if left > 0:
            yield self._source.make(session_rng(self._seed, "tail", index), left)

    def _make(self, hash_id: int, num_tokens: int) -> Piece:
        return self._source.make(session_rng(self._seed, "block", hash_id), num_tokens)

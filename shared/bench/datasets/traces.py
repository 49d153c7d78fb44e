"""Recorded workloads: Mooncake's (FAST'25) and Azure's (2023) trace formats."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from phloem.shared.bench.datasets.options import DatasetOptions, session_rng
from phloem.shared.bench.datasets.trace_rows import MOONCAKE_BLOCK_TOKENS, TraceRow, trace_rows
from phloem.shared.bench.prompt_source import Piece, PromptSource
from phloem.shared.bench.session import Session, Turn, join_pieces

_BLOCKS_KEPT = 4096


def trace_sessions(options: DatasetOptions, source: PromptSource, seed: int) -> Iterator[Session]:
    """A trace in either format. Raises `ConfigError` for a row that can't be read.

    Requests over `max_input_tokens` are left out. A hash id of Mooncake's stands for one fixed block of 512
    random tokens, so that equal ids are equal content at equal places; the last block of a prompt is cut to
    its length. Azure's prompts share nothing.
    """
    blocks = _Blocks(source, seed)
    for index, row in enumerate(trace_rows(options.required_path())):
        if options.fits(row.num_input):
            yield _session(options, source, seed, index, row, blocks)


def _session(
    options: DatasetOptions, source: PromptSource, seed: int, index: int, row: TraceRow, blocks: _Blocks
) -> Session:
    if row.hash_ids is None:
        rng = session_rng(seed, "azure", index)
        pieces = [source.make(rng, max(row.num_input, 1))]
        added = pieces[0].json
    else:
        rng = session_rng(seed, "mooncake", index)
        pieces = list(blocks.prompt(row.hash_ids, row.num_input, index))
        added = join_pieces(source.kind, [piece.json for piece in pieces])
    num_tokens = [piece.num_tokens for piece in pieces]
    turn = Turn(
        added=added,
        max_tokens=options.output_tokens(rng, row.num_output),
        num_added_tokens=sum(num_tokens) if all(num_tokens) else 0,
    )
    return Session(index, source.kind, (turn,), row.at_s * options.time_scale)


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

"""Random prompts, shared prefixes, conversations."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from phloem.shared.bench.datasets.options import DatasetOptions, make_turn, session_rng
from phloem.shared.bench.prompt_source import Piece, PromptSource
from phloem.shared.bench.session import Session, Turn, join_pieces


def random_sessions(options: DatasetOptions, source: PromptSource, seed: int) -> Iterator[Session]:
    """Single prompts that share nothing."""
    for index in itertools.count():
        rng = session_rng(seed, "random", index)
        yield Session(index, source.kind, (make_turn(options, source, rng, first=True),))


def multi_turn_sessions(options: DatasetOptions, source: PromptSource, seed: int) -> Iterator[Session]:
    """Conversations of `num_turns`, each turn's prompt being the one before, its answer, and new input."""
    for index in itertools.count():
        rng = session_rng(seed, "multi-turn", index)
        turns = (make_turn(options, source, rng, first=turn == 0) for turn in range(options.num_turns))
        yield Session(index, source.kind, tuple(turns))


def shared_prefix_sessions(options: DatasetOptions, source: PromptSource, seed: int) -> Iterator[Session]:
    """Conversations that begin with the prefix of their group. Groups are drawn with weight 1 / rank**zipf
    (0: all alike)."""
    prefixes = [_prefix(options, source, seed, group) for group in range(options.num_groups)]
    weights = [1.0 / (rank + 1) ** options.zipf for rank in range(options.num_groups)]
    cumulative = list(itertools.accumulate(weights))
    for index in itertools.count():
        rng = session_rng(seed, "shared-prefix", index)
        prefix = rng.choices(prefixes, cum_weights=cumulative)[0]
        yield Session(index, source.kind, tuple(_turns(options, source, rng, prefix)))


def _prefix(options: DatasetOptions, source: PromptSource, seed: int, group: int) -> Piece:
    rng = session_rng(seed, "prefix", group)
    piece = source.make(rng, options.prefix_tokens, role="system")
    return Piece(join_pieces(source.kind, (piece.json, b"")), piece.num_tokens)


def _turns(
    options: DatasetOptions, source: PromptSource, rng: random.Random, prefix: Piece
) -> Iterator[Turn]:
    for turn in range(options.num_turns):
        if turn == 0:
            yield make_turn(
                options, source, rng, first=True, before=prefix.json, before_tokens=prefix.num_tokens
            )
        else:
            yield make_turn(options, source, rng, first=False)

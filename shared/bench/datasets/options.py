"""The options of all datasets, and the rows that several of them share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from phloem.shared.bench.lengths import LengthRange
from phloem.shared.bench.prompt_source import PromptSource
from phloem.shared.bench.session import Turn, tokens_json
from phloem.shared.errors import ConfigError

DatasetName: TypeAlias = Literal["random", "shared-prefix", "multi-turn", "trace", "sharegpt", "jsonl"]


class DatasetOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Lengths are in tokens. `input_lengths` is of a prompt or, in conversations, of what each turn adds;
    `output_lengths` None leaves it to the dataset. Zero for a maximum: none. `time_scale` stretches a
    trace's gaps (0.5: twice as fast)."""

    name: DatasetName = "random"
    path: str = ""
    input_lengths: LengthRange = LengthRange(512, 512)
    output_lengths: LengthRange | None = None
    prefix_tokens: int = 1024
    num_groups: int = 16
    num_turns: int = 1
    zipf: float = 1.0
    think_s: float = 0.0
    time_scale: float = 1.0
    max_input_tokens: int = 0
    max_output_tokens: int = 0

    def output_tokens(self, rng: random.Random, recorded: int | None = None) -> int:
        """How much to ask for: the option's, else what the dataset recorded, else 128; within the maximum."""
        if self.output_lengths is not None:
            wanted = self.output_lengths.draw(rng)
        else:
            wanted = 128 if recorded is None else max(recorded, 1)
        return min(wanted, self.max_output_tokens) if self.max_output_tokens else wanted

    def required_path(self) -> Path:
        """The file. Raises `ConfigError` when none was named or it isn't there."""
        if not self.path:
            raise ConfigError(f"--dataset {self.name} needs a file: --dataset-path FILE")
        path = Path(self.path)
        if not path.is_file():
            raise ConfigError(f"--dataset-path: there is no file {path}")
        return path

    def fits(self, num_input_tokens: int) -> bool:
        return not self.max_input_tokens or num_input_tokens <= self.max_input_tokens


def session_rng(seed: int, name: str, index: int | str) -> random.Random:
    """A generator of its own for each session, so that the n-th is the same however many are drawn."""
    return random.Random(f"{seed}/{name}/{index}")


def make_turn(
    options: DatasetOptions,
    source: PromptSource,
    rng: random.Random,
    *,
    first: bool,
    before: bytes = b"",
    before_tokens: int = 0,
) -> Turn:
    """A turn of random content after `before` (a prefix, already joined)."""
    piece = source.make(rng, options.input_lengths.draw(rng))
    max_tokens = options.output_tokens(rng)
    is_known = piece.num_tokens and (before_tokens or not before)
    return Turn(
        added=before + piece.json,
        max_tokens=max_tokens,
        num_added_tokens=before_tokens + piece.num_tokens if is_known else 0,
        think_s=0.0 if first else options.think_s,
        stub=_stub(source, rng, max_tokens),
    )


def _stub(source: PromptSource, rng: random.Random, num_tokens: int) -> bytes:
    """Tokens in place of an answer whose ids the server keeps to itself."""
    return source.make(rng, num_tokens).json if source.kind == "tokens" else tokens_json(())

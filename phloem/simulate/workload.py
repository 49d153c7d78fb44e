"""What arrives when: recorded traces and a synthetic one, as lengths and names of content blocks."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import msgspec

from phloem.shared.bench.arrivals import Rate, arrival_times
from phloem.shared.errors import ConfigError

CONTENT_TOKENS = 512  # Mooncake's blocks; equal names are equal content at equal places


class SimRequest(msgspec.Struct, frozen=True):
    """`content` names the prompt's blocks of 512 tokens; the last one is cut to `num_tokens`."""

    index: int
    arrival_s: float
    num_tokens: int
    num_output_tokens: int
    content: Sequence[int]

    def prompt_units(self, grain: int) -> list[int]:
        """The prompt in units of `grain` tokens. A block's first unit names it, the others only count: two
        blocks differ from their first unit on, and small ints cost no memory."""
        per_block = CONTENT_TOKENS // grain
        units: list[int] = []
        rest = list(range(1, per_block))
        for name in self.content:
            units.append(name + per_block)
            units += rest
        del units[-(-self.num_tokens // grain) :]
        return units


class _MooncakeRow(msgspec.Struct):
    timestamp: float  # ms
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def load_trace(path: Path, *, max_requests: int = 0) -> list[SimRequest]:
    """A trace in Mooncake's format (JSON lines) or Azure's (CSV), told by its first character.

    `max_requests` takes the first ones only; 0: all. Raises `ConfigError` for what can't be read.
    """
    try:
        with path.open("rb") as file:
            rows = _mooncake(path) if file.read(1) == b"{" else _azure(path)
        requests = [request for _, request in zip(range(max_requests or 1 << 62), rows, strict=False)]
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    if not requests:
        raise ConfigError(f"{path} holds no request")
    return requests


def spread_ticks(requests: Sequence[SimRequest], seed: int) -> list[SimRequest]:
    """Arrivals of equal times, drawn evenly from the time until the next one: the clock of Mooncake's trace
    ticks every 3 s, and its users did not all come at the tick."""
    rng = random.Random(f"ticks/{seed}")
    times = sorted({request.arrival_s for request in requests})
    ends = dict(zip(times, [*times[1:], times[-1]], strict=True))
    spread = [
        msgspec.structs.replace(r, arrival_s=rng.uniform(r.arrival_s, ends[r.arrival_s])) for r in requests
    ]
    return sorted(spread, key=lambda request: (request.arrival_s, request.index))


def shared_prefix(
    num_requests: int,
    *,
    rate: float,
    seed: int,
    prefix_tokens: int = 4096,
    share: float = 0.5,
    num_others: int = 64,
    suffix_tokens: tuple[int, int] = (256, 4096),
    output_tokens: tuple[int, int] = (16, 512),
) -> list[SimRequest]:
    """Poisson arrivals, `rate` a second: one prefix takes `share` of them, `num_others` share the rest;
    what follows a prefix is nobody else's. Lengths are uniform in their (low, high)."""
    rng = random.Random(f"shared-prefix/{seed}")
    times = arrival_times(Rate(rate, rate), "poisson", seed=seed)
    blocks = prefix_tokens // CONTENT_TOKENS
    next_name = (1 + num_others) * blocks
    requests: list[SimRequest] = []
    for index in range(num_requests):
        group = 0 if rng.random() < share else rng.randint(1, num_others)
        num_tokens = blocks * CONTENT_TOKENS + rng.randint(*suffix_tokens)
        own = -(-num_tokens // CONTENT_TOKENS) - blocks
        content = [*range(group * blocks, (group + 1) * blocks), *range(next_name, next_name + own)]
        next_name += own
        requests.append(SimRequest(index, next(times), num_tokens, rng.randint(*output_tokens), content))
    return requests


def _mooncake(path: Path) -> Iterator[SimRequest]:
    decoder = msgspec.json.Decoder(_MooncakeRow)
    with path.open("rb") as lines:
        for index, line in enumerate(lines):
            try:
                row = decoder.decode(line)
            except msgspec.DecodeError as error:
                raise ConfigError(f"{path}, line {index + 1}: {error}") from error
            if row.input_length < 1 or len(row.hash_ids) != -(-row.input_length // CONTENT_TOKENS):
                raise ConfigError(f"{path}, line {index + 1}: hash_ids don't cover input_length")
            output = max(1, row.output_length)
            yield SimRequest(index, row.timestamp / 1e3, row.input_length, output, row.hash_ids)


def _azure(path: Path) -> Iterator[SimRequest]:
    """The trace knows lengths and times only: prompts share nothing."""
    first: datetime | None = None
    next_name = 0
    with path.open(encoding="utf-8", newline="") as rows:
        for index, row in enumerate(csv.DictReader(rows)):
            try:
                at = datetime.fromisoformat(row["TIMESTAMP"])
                num_input, num_output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (KeyError, ValueError) as error:
                raise ConfigError(f"{path}, row {index + 1}: {error!r}") from error
            first = first or at
            num_input = max(1, num_input)
            count = -(-num_input // CONTENT_TOKENS)
            names = range(next_name, next_name + count)
            next_name += count
            arrival_s = (at - first).total_seconds()
            yield SimRequest(index, arrival_s, num_input, max(1, num_output), names)

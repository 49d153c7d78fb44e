"""What arrives when: recorded traces and a synthetic one, as lengths and names of content blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

from phloem.shared.bench.arrivals import Rate, arrival_times
from phloem.shared.bench.datasets.trace_rows import MOONCAKE_BLOCK_TOKENS, TraceRow, trace_rows
from phloem.shared.errors import ConfigError

CONTENT_TOKENS = MOONCAKE_BLOCK_TOKENS  # equal names are equal content at equal places
_MAX_BLOCKS = 1 << 12  # of one prompt of a trace without names: 2 million tokens


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

    def answer_units(self, grain: int) -> int:
        """The answer in such units; its first token is a unit of its own."""
        return 1 + -(-(self.num_output_tokens - 1) // grain)


def load_trace(path: Path, *, max_requests: int = 0) -> list[SimRequest]:
    """A trace in Mooncake's format (JSON lines) or Azure's (CSV), told by its first character.

    `max_requests` takes the first ones only; 0: all. Raises `ConfigError` for what can't be read.
    """
    try:
        rows = zip(range(max_requests or 1 << 62), trace_rows(path), strict=False)
        requests = [_request(path, index, row) for index, row in rows]
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


def _request(path: Path, index: int, row: TraceRow) -> SimRequest:
    """Prompts of a trace that names no blocks share nothing."""
    num_tokens = max(1, row.num_input)
    count = -(-num_tokens // CONTENT_TOKENS)
    content: Sequence[int]
    if row.hash_ids is None:
        content = range(index * _MAX_BLOCKS, index * _MAX_BLOCKS + count)
    elif len(row.hash_ids) == count:
        content = row.hash_ids
    else:
        raise ConfigError(f"{path}, line {index + 1}: hash_ids don't cover input_length")
    return SimRequest(index, row.at_s, num_tokens, max(1, row.num_output), content)

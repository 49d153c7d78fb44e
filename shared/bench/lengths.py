"""Lengths in tokens: fixed or ranged."""

from __future__ import annotations

import random

import msgspec

from phloem.shared.errors import ConfigError


class LengthRange(msgspec.Struct, frozen=True):
    """Whole numbers from `low` to `high`, both included, equally likely."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


def parse_lengths(text: str, what: str) -> LengthRange:
    """From "512" or "256:1024". Raises `ConfigError` unless 1 <= low <= high."""
    first, _, last = text.partition(":")
    try:
        lengths = LengthRange(int(first), int(last or first))
    except ValueError:
        lengths = LengthRange(0, 0)
    if not 1 <= lengths.low <= lengths.high:
        raise ConfigError(f"{what} {text!r}: write a number of tokens, or LOW:HIGH")
    return lengths

"""Which tiles a product of few rows uses. Pure; measured on an H200 (`benchmarks/tune_decode.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

Product: TypeAlias = Literal["normed", "gated", "adds"]

MAX_ROWS = 64  # beyond, the library's matrix products are as fast
FEW_ROWS = 16  # the matrix units' narrow side is half empty: bytes are all that counts
_MIN_BLOCKS = 90  # of a launch, or memory is not busy; the sum over k is split until there are as many
_MAX_SPLIT = 8


class Tiling(NamedTuple):
    """block_n: rows of the weight in a tile; block_k: its columns at a time; split_k: blocks that share a
    tile's sum; tma: tiles of the weight come by the tensor memory accelerator (Hopper and later)."""

    block_n: int
    block_k: int
    split_k: int
    stages: int
    warps: int
    tma: bool = False


# (product, few rows): the best tiles where they divide the weight.
_BEST: dict[tuple[Product, bool], Tiling] = {
    ("normed", True): Tiling(64, 64, 1, 8, 4),
    ("gated", True): Tiling(64, 64, 1, 3, 4, tma=True),
    ("adds", True): Tiling(64, 128, 2, 5, 4, tma=True),
    ("normed", False): Tiling(64, 128, 1, 6, 4, tma=True),
    ("gated", False): Tiling(128, 64, 1, 4, 4, tma=True),
    ("adds", False): Tiling(64, 128, 2, 6, 4, tma=True),
}
_DEEP = 8_192  # inputs of a down projection
_BEST_DEEP = Tiling(64, 128, 4, 3, 8)
_LARGE = 65_536  # outputs of a vocabulary
_BEST_LARGE = {True: Tiling(64, 128, 1, 5, 4), False: Tiling(128, 64, 1, 4, 4)}


def choose_tiling(product: Product, n: int, k: int, num_rows: int, *, hopper: bool) -> Tiling | None:
    """For `n` outputs of `k` inputs each; None when no tile divides them, or there are too many rows."""
    if num_rows > MAX_ROWS:
        return None
    few = num_rows <= FEW_ROWS
    best = _BEST[product, few]
    if product == "normed" and n >= _LARGE:
        best = _BEST_LARGE[few]
    elif product == "adds" and k >= _DEEP and not few:
        best = _BEST_DEEP
    block_n = next((size for size in _down_from(best.block_n) if n % size == 0), None)
    block_k = next((size for size in _down_from(best.block_k) if k % size == 0), None)
    if block_n is None or block_k is None:
        return None
    split = _split(n // block_n, k // block_k, best.split_k)
    return best._replace(block_n=block_n, block_k=block_k, split_k=split, tma=best.tma and hopper)


def _down_from(size: int) -> Iterator[int]:
    while size >= 16:
        yield size
        size //= 2


def _split(num_tiles: int, num_blocks: int, least: int) -> int:
    """The fewest parts from `least` on that fill the device, each of whole blocks of k."""
    parts = [split for split in range(1, _MAX_SPLIT + 1) if num_blocks % split == 0]
    enough = (split for split in parts if split >= least and num_tiles * split >= _MIN_BLOCKS)
    return next(enough, parts[-1])


class AttentionTiling(NamedTuple):
    """block_n: keys at a time."""

    block_n: int
    stages: int
    warps: int


def choose_attention_tiling(num_rows: int, head_dim: int) -> AttentionTiling:
    """For `num_rows` sequences of one new token each."""
    if num_rows <= 8:
        tiling = AttentionTiling(128, 2, 4)
    elif num_rows <= 32:
        tiling = AttentionTiling(32, 4, 4)
    elif num_rows <= 128:
        tiling = AttentionTiling(64, 2, 8)
    else:
        tiling = AttentionTiling(32, 2, 2)
    if head_dim > 128:
        return tiling._replace(block_n=min(tiling.block_n, 32), stages=2)
    return tiling

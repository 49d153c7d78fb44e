"""How much of a chain each slot holds: pure, and exact for what is prefix-closed.

A worker's radix tree holds a block only with all blocks before it, so a slot's bit is set in blocks 0 .. k-1
of a chain and nowhere behind. Every 16th block then says in which stretch a slot's k lies; only those
stretches are read:

    block    0 ......... 15 ......... 31 ......... 47 ......... 63
    sample               *            *            *            *
    slot a   1 1 1 1 1 1 1 1 1 1 0 0 0 0 0 0 ...                     k between 16 and 31: read 16 .. 30
    slot b   0 0 0 ...                                               k below 16: read 0 .. 14
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import TypeAlias

STRIDE = 16
# Shorter chains are read whole: a second round trip costs more than these keys (8,192 tokens).
READ_WHOLE = 128

# Yields indices of blocks to read, is sent their bitmaps in that order; returns slot -> k, for k > 0.
Matching: TypeAlias = Generator[Sequence[int], Sequence[int], dict[int, int]]


def matching(num_blocks: int, live_mask: int) -> Matching:
    """Finds for each slot in `live_mask` how many leading blocks of a chain it holds; reads at most twice."""
    if num_blocks == 0 or live_mask == 0:
        return {}
    samples = _samples(num_blocks)
    bitmaps = dict(zip(samples, (yield samples), strict=True))
    wanted = [i for start, end in _open_stretches(samples, bitmaps, live_mask) for i in range(start, end)]
    if wanted:
        bitmaps.update(zip(wanted, (yield wanted), strict=True))
    return _lengths(num_blocks, bitmaps, live_mask)


def _samples(num_blocks: int) -> Sequence[int]:
    if num_blocks <= READ_WHOLE:
        return range(num_blocks)
    return [*range(STRIDE - 1, num_blocks - 1, STRIDE), num_blocks - 1]


def _open_stretches(
    samples: Sequence[int], bitmaps: dict[int, int], live_mask: int
) -> Generator[tuple[int, int], None, None]:
    """The blocks [start, end) between two samples where at least one slot ends."""
    alive = live_mask
    for previous, sample in pairwise((-1, *samples)):
        still_alive = alive & bitmaps[sample]
        if still_alive != alive and previous + 1 < sample:
            yield previous + 1, sample
        alive = still_alive
        if not alive:
            return


def _lengths(num_blocks: int, bitmaps: dict[int, int], live_mask: int) -> dict[int, int]:
    """Walks the blocks that were read; the ones between are held by whoever holds the next sample."""
    lengths: dict[int, int] = {}
    alive = live_mask
    for index in sorted(bitmaps):
        ended = alive & ~bitmaps[index]
        _record(lengths, ended, index)
        alive &= bitmaps[index]
        if not alive:
            break
    _record(lengths, alive, num_blocks)
    return lengths


def _record(lengths: dict[int, int], slots_mask: int, length: int) -> None:
    if length == 0:
        return
    while slots_mask:
        lowest = slots_mask & -slots_mask
        lengths[lowest.bit_length() - 1] = length
        slots_mask ^= lowest

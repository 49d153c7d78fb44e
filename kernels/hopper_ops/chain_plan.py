"""How the blocks of `product_chain.cu` share the products of a step. Pure; constants measured on an H200."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

from phloem.kernels.types import DecodeShape

SIZES = (16, 32, 64)  # kernels, by rows of x
NAMES = ("qkv", "o", "gate_up", "down", "vocabulary")  # products, as numbered in the kernel
TEAMS = 2  # of warps: each multiplies by half of a tile, or by a small one in turn
MAX_JOINS = 128  # tiles of a product whose parts are joined, as in product_chain.cu
INPUTS = 64  # in a row of a slot
# Of K and of V, that a block asks for before the attention after a launch: 25 MB of all blocks, half of L2.
ASKED_BYTES = 96 << 10
_ROW_BYTES = 2 * INPUTS
_SMALL = 64  # rows of a tile, as in product_chain.cu
_STEP, _MOST_ROWS = 16, 224  # of a tile: multiples; of both halves twice as many
_MOST_SPLITS = 8
_DEPTHS = (8, 4, 2, 1)
_LEAST_SLOT = 32 << 10  # bytes
_SHARED_BYTES = (227 << 10) - 1024  # of a block, without barriers and factors
_X_ROWS = 64  # that the matrix units read of a slot, however many there are
# What a block reads from L2, x too, comes faster than what all read from memory, by this.
_FROM_L2 = 0.65
# Of a join, in rows of 64 inputs (0.004 us): until all have written and know of each other; for each row of
# a tile of 64 rows of x, to write and read.
_MEETING, _PARTS = 1000, 4.4
_ROUND = 150  # of a further tile: its sums are finished while none is multiplied


class Tiles(NamedTuple):
    """rows of the weight in a tile; tiles; 64s of inputs in a unit; parts of k that several blocks sum."""

    rows: int
    num: int
    depth: int
    splits: int

    @property
    def items(self) -> int:
        return self.num * self.splits

    def unit_bytes(self, size: int) -> int:
        """With so many rows of x."""
        return self.depth * (self.rows + size) * _ROW_BYTES


class ChainPlan(NamedTuple):
    """size: rows of x; blocks of a launch, all resident at once; units in the ring; tiles by product."""

    size: int
    blocks: int
    stages: int
    tiles: Mapping[str, Tiles]

    @property
    def slot_bytes(self) -> int:
        return max(tiles.unit_bytes(self.size) for tiles in self.tiles.values())

    @property
    def shared_bytes(self) -> int:
        """The ring, and what is behind it."""
        return self.stages * self.slot_bytes + self._behind

    @property
    def most_stages(self) -> int:
        """Units that there is room for."""
        return (_SHARED_BYTES - self._behind) // self.slot_bytes

    @property
    def part_floats(self) -> int:
        """Memory for the sums of one launch."""
        return max((t.rows * t.items for t in self.tiles.values() if t.splits > 1), default=1) * _X_ROWS

    def boxes(self, name: str) -> int:
        """That a unit of the weight comes in."""
        return 1 if self._is_small(name) else TEAMS

    @property
    def _behind(self) -> int:
        """What the matrix units read beyond the last rows of x; sums that teams exchange."""
        small = (tiles.rows for name, tiles in self.tiles.items() if self._is_small(name))
        return max((_X_ROWS - self.size) * _ROW_BYTES, max(small, default=0) * self.size * 4)

    def _is_small(self, name: str) -> bool:
        return self.tiles[name].rows <= _SMALL and name != "gate_up"


def size_of(num_rows: int) -> int:
    """The kernel for so many rows of x."""
    return next(size for size in SIZES if num_rows <= size)


def plan_chain(shape: DecodeShape, size: int, blocks: int) -> ChainPlan | None:
    """None where the kernel can't have these products: whole 16s of outputs, of whole 64s of inputs."""
    if any(n % _STEP or k % INPUTS for _, n, k in shape.products()):
        return None
    tiles = {
        name: min(_choices(name, n, k, size, blocks), key=partial(_cost, k=k, size=size, blocks=blocks))
        for name, (_, n, k) in zip(NAMES, shape.products(), strict=True)
    }
    plan = ChainPlan(size, blocks, 0, tiles)
    return plan._replace(stages=plan.most_stages)


def _choices(name: str, n: int, k: int, size: int, blocks: int) -> Iterator[Tiles]:
    step, most_splits = _STEP, _MOST_SPLITS
    slot = max(_LEAST_SLOT, Tiles(_MOST_ROWS, 1, 1, 1).unit_bytes(size))
    if name == "gate_up":
        step, n = 2 * _STEP, 2 * n
    if name in ("gate_up", "vocabulary"):  # tiles enough for all blocks
        most_splits = 1
    for rows in range(step, _MOST_ROWS + 1, step):
        depth = next(depth for depth in _DEPTHS if Tiles(rows, 1, depth, 1).unit_bytes(size) <= slot)
        num = -(-n // rows)
        yield Tiles(rows, num, depth, 1)
        for splits in range(2, min(most_splits, k // INPUTS // depth, rows // 8 // TEAMS) + 1):
            if num * splits <= blocks and num <= MAX_JOINS:
                yield Tiles(rows, num, depth, splits)


def _cost(tiles: Tiles, k: int, size: int, blocks: int) -> float:
    """Of the busiest block, in rows of 64 inputs that it reads from memory."""
    rounds = -(-tiles.items // blocks)
    units = -(-k // INPUTS // tiles.depth // tiles.splits)
    work = rounds * units * tiles.depth * max(tiles.rows, _FROM_L2 * (tiles.rows + size))
    join = _MEETING + _PARTS * tiles.rows * size / _X_ROWS
    return work + (rounds - 1) * _ROUND + (join if tiles.splits > 1 else 0)

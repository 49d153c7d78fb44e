"""How the blocks of `product_chain.cu` share the products of a step. Pure; constants measured on an H200."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

from phloem.kernels.types import DecodeShape

SIZES = (16, 32, 64)  # kernels, by rows of x
CLUSTERS = (1, 2, 4)  # blocks of one
NAMES = ("qkv", "o", "gate_up", "down", "vocabulary")  # products, as numbered in the kernel
TEAMS = 2  # of warps: each multiplies by half of a tile, or by a small one in turn
MAX_JOINS = 128  # tiles of a product whose parts are joined, as in chain.cuh
INPUTS = 64  # in a row of a slot
_ROW_BYTES = 2 * INPUTS
_SMALL = 64  # rows of a tile, as in chain.cuh
_STEP, _MOST_ROWS = 16, 224  # of a tile: multiples; of both halves twice as many
_MOST_SPLITS = 8
_DEPTHS = (8, 4, 2, 1)
_LEAST_UNIT = 32 << 10  # bytes, of the weight and of x
SHARED_BYTES = (227 << 10) - 2048  # of a block, without barriers and factors
_X_BYTES = 48 << 10  # of the ring of x, which comes from L2
_ALIGNMENT = 1024  # of units: what the swizzle repeats after
_X_ROWS = 64  # that the matrix units read of a slot, however many there are
# What a block reads from L2, x too, comes faster than what all read from memory, by this.
_FROM_L2 = 0.65
# Of a join, in rows of 64 inputs (0.004 us): until all have written and know of each other; for each row of
# a tile of 64 rows of x, to write and read.
_MEETING, _PARTS = 1500, 4.4
_CLUSTER_MEETING, _CLUSTER_PARTS = 300, 1.5  # the same within a cluster
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

    @property
    def weight_bytes(self) -> int:
        """Of a unit."""
        return self.depth * self.rows * _ROW_BYTES

    def x_bytes(self, size: int) -> int:
        """Of a unit with so many rows of x."""
        return self.depth * size * _ROW_BYTES

    def unit_bytes(self, size: int) -> int:
        return self.weight_bytes + self.x_bytes(size)


class ChainPlan(NamedTuple):
    """size: rows of x; blocks of a launch, all resident at once; tiles by product; cluster: how many blocks
    write into each other's shared memory, 1: none do."""

    size: int
    blocks: int
    tiles: Mapping[str, Tiles]
    cluster: int = 1

    @property
    def x_bytes(self) -> int:
        """Of the ring of x. A unit is freed when the one behind it is there: three so fit in any case."""
        return max(_X_BYTES, 3 * max(tiles.x_bytes(self.size) for tiles in self.tiles.values()))

    @property
    def weight_bytes(self) -> int:
        """Of the ring of weights: all that there is room for."""
        return (SHARED_BYTES - self._behind - self.x_bytes) // _ALIGNMENT * _ALIGNMENT

    @property
    def shared_bytes(self) -> int:
        """The rings, and what is behind them."""
        return self.weight_bytes + self.x_bytes + self._behind

    @property
    def part_floats(self) -> int:
        """Memory for the sums of one launch."""
        if self.cluster > 1:
            return 1
        return max((t.rows * t.items for t in self.tiles.values() if t.splits > 1), default=1) * _X_ROWS

    def boxes(self, name: str) -> int:
        """That a unit of the weight comes in."""
        return 1 if self._is_small(name) else TEAMS

    @property
    def exchanged(self) -> int:
        """Bytes of sums that a block's teams exchange."""
        small = (tiles.rows for name, tiles in self.tiles.items() if self._is_small(name))
        return max(small, default=0) * self.size * 4

    @property
    def _behind(self) -> int:
        """What the matrix units read beyond the last rows of x; sums that teams exchange, and blocks."""
        return max((_X_ROWS - self.size) * _ROW_BYTES, self.exchanged + self._given)

    @property
    def _given(self) -> int:
        """Sums that a block gets of the others of its cluster."""
        if self.cluster == 1:
            return 0
        threads = 4 * TEAMS * 32
        eights = (
            (tiles.splits - 1) * -(-tiles.rows // 8 // TEAMS // tiles.splits)
            for tiles in self.tiles.values()
            if tiles.splits > 1
        )
        return max(eights, default=0) * threads * 16

    def _is_small(self, name: str) -> bool:
        return self.tiles[name].rows <= _SMALL and name != "gate_up"


def size_of(num_rows: int) -> int:
    """The kernel for so many rows of x."""
    return next(size for size in SIZES if num_rows <= size)


def plan_chain(shape: DecodeShape, size: int, blocks: Mapping[int, int]) -> ChainPlan | None:
    """blocks: how many can be resident, by the size of their clusters (1: none). None where the kernel can't
    have these products: whole 16s of outputs, of whole 64s of inputs."""
    if any(n % _STEP or k % INPUTS for _, n, k in shape.products()):
        return None
    plans = [_plan(shape, size, count, cluster) for cluster, count in blocks.items() if count]
    return min(plans, key=lambda plan: plan[0])[1] if plans else None


def _plan(shape: DecodeShape, size: int, blocks: int, cluster: int) -> tuple[float, ChainPlan]:
    """And what it costs."""
    tiles, all_costs = {}, 0.0
    for name, (_, n, k) in zip(NAMES, shape.products(), strict=True):
        cost = partial(_cost, k=k, size=size, blocks=blocks, cluster=cluster)
        tiles[name] = min(_choices(name, n, k, size, blocks, cluster), key=cost)
        all_costs += cost(tiles[name]) if name != "vocabulary" else 0.0  # it is once in a step
    return all_costs, ChainPlan(size, blocks, tiles, cluster)


def _choices(name: str, n: int, k: int, size: int, blocks: int, cluster: int) -> Iterator[Tiles]:
    step, most_splits = _STEP, _MOST_SPLITS
    most = max(_LEAST_UNIT, Tiles(_MOST_ROWS, 1, 1, 1).unit_bytes(size))
    if name == "gate_up":
        step, n = 2 * _STEP, 2 * n
    # Some have tiles enough for all blocks; qkv of 64 rows was 0.3% slower in parts of a cluster.
    if name in ("gate_up", "vocabulary") or (name == "qkv" and cluster > 1):
        most_splits = 1
    for rows in range(step, _MOST_ROWS + 1, step):
        depth = next(depth for depth in _DEPTHS if Tiles(rows, 1, depth, 1).unit_bytes(size) <= most)
        num = -(-n // rows)
        yield Tiles(rows, num, depth, 1)
        for splits in range(2, min(most_splits, k // INPUTS // depth, rows // 8 // TEAMS) + 1):
            if num * splits <= blocks and num <= MAX_JOINS and (cluster == 1 or cluster % splits == 0):
                yield Tiles(rows, num, depth, splits)


def _cost(tiles: Tiles, k: int, size: int, blocks: int, cluster: int) -> float:
    """Of the busiest block, in rows of 64 inputs that it reads from memory."""
    rounds = -(-tiles.items // blocks)
    units = -(-k // INPUTS // tiles.depth // tiles.splits)
    work = rounds * units * tiles.depth * max(tiles.rows, _FROM_L2 * (tiles.rows + size))
    meeting, parts = (_MEETING, _PARTS) if cluster == 1 else (_CLUSTER_MEETING, _CLUSTER_PARTS)
    join = meeting + parts * tiles.rows * size / _X_ROWS
    return work + (rounds - 1) * _ROUND + (join if tiles.splits > 1 else 0)

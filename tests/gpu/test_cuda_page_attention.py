"""Attention over pages on Hopper against float64: heads, page sizes, lengths, memory never written."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from phloem.kernels.hopper_ops.page_attention import PageAttention
from phloem.kernels.hopper_ops.page_plan import plan_pages
from phloem.kernels.types import DecodeRows, DecodeShape
from phloem.shared.engine.models.kv_cache import KVCache
from tests.support.device_ops import relative_error
from tests.support.hopper import skip_unless_hopper

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
EPS = 1e-5
MAX_TOKENS = 4096
TOLERANCE = 1e-2  # queries, keys and weights are rounded to 8 bits
LENGTHS = {
    "one": [1],
    "short": [1, 2, 15, 16, 17, 33],
    "one long": [3, 3000, 16],
    "full": [1024] * 64,
    "mixed": [1 + 37 * row % 700 for row in range(61)],
    "ones": [1] * 64,
    "a row a block": [128] * 64,
    "two a row": [256] * 64,
}


class Case(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int = 16
    has_norms: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> DecodeShape:
        return DecodeShape(512, 512, 512, self.heads, self.kv_heads, self.head_dim)


CASES = [
    Case(32, 8, 128),
    Case(28, 4, 128),
    Case(32, 8, 128, 32, has_norms=True),
    Case(8, 1, 128, dtype=torch.float16),
    Case(4, 2, 64, 16, has_norms=True),
    Case(8, 8, 64),
    Case(4, 1, 256, has_norms=True),
    Case(8, 1, 64),
    Case(6, 2, 128),
    Case(12, 4, 256, dtype=torch.float16),
    Case(20, 4, 64, 64),
]


class World:
    """Rows of a step over pages that lie about; what no token was written to is no number."""

    def __init__(self, case: Case, lengths: list[int]) -> None:
        self.case, self.lengths = case, lengths
        count, size = len(lengths), case.page_size
        pages = [-(-length // size) for length in lengths]
        ids = torch.split(torch.randperm(sum(pages) + 3), [*pages, 3])
        slots = torch.randperm(count + 2)[:count]
        table = torch.zeros((count + 2, MAX_TOKENS // size), dtype=torch.int32)
        self.token_of = []  # by row: where each of its tokens lies in the pool
        for row, length in enumerate(lengths):
            table[slots[row], : pages[row]] = ids[row].int()
            at = torch.arange(length)
            self.token_of.append((ids[row][at // size] * size + at % size).to(CUDA))
        self.spare_page, self.spare_slot = (
            int(ids[-1][0]),
            next(n for n in range(count + 2) if n not in slots),
        )
        pool = (sum(pages) + 3, size, case.kv_heads, case.head_dim)
        self.kv = KVCache(
            *([torch.full(pool, float("nan"), dtype=case.dtype, device=CUDA)] for _ in range(2))
        )
        for plane in (self.kv.k[0], self.kv.v[0]):
            for places in self.token_of:
                old = places[:-1]
                plane.view(-1, *pool[2:])[old] = random(case, len(old), *pool[2:])
        self.qkv = random(case, count, (case.heads + 2 * case.kv_heads) * case.head_dim)
        angles = torch.randn(MAX_TOKENS, case.head_dim // 2, device=CUDA)
        self.cos, self.sin = angles.cos().to(case.dtype), angles.sin().to(case.dtype)
        gains = 1 + random(case, 2, case.head_dim) / 4
        self.norms = (gains[0], gains[1]) if case.has_norms else None
        self.rows = DecodeRows(
            token=torch.zeros(count, dtype=torch.int64, device=CUDA),
            slot=slots.to(CUDA),
            position=torch.tensor(lengths, device=CUDA) - 1,
            write_index=torch.stack([places[-1] for places in self.token_of]),
            last_token=torch.zeros(1, dtype=torch.int64, device=CUDA),
            page_table=table.to(CUDA),
            work=torch.zeros((0, 8), dtype=torch.int32, device=CUDA),
            cos=self.cos,
            sin=self.sin,
        )

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """float64: what each row attends to, and its new key and value."""
        case = self.case
        heads = self.qkv.double().view(len(self.lengths), -1, case.head_dim)
        q, k, v = heads.tensor_split((case.heads, case.heads + case.kv_heads), dim=1)
        q_norm, k_norm = self.norms or (None, None)
        q, k = self._turned(q, q_norm), self._turned(k, k_norm)
        out = []
        for row, places in enumerate(self.token_of):
            old = [
                plane.view(-1, case.kv_heads, case.head_dim)[places[:-1]]
                for plane in (self.kv.k[0], self.kv.v[0])
            ]
            keys, values = (
                torch.cat([plane.double(), new[row : row + 1]])
                for plane, new in zip(old, (k, v), strict=True)
            )
            group = case.heads // case.kv_heads
            scores = torch.einsum("hd,thd->ht", q[row], keys.repeat_interleave(group, 1)) / case.head_dim**0.5
            out.append(
                torch.einsum("ht,thd->hd", scores.softmax(1), values.repeat_interleave(group, 1)).flatten()
            )
        return torch.stack(out), k, v

    def _turned(self, heads: Tensor, gain: Tensor | None) -> Tensor:
        if gain is not None:
            heads = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + EPS) * gain.double()
        low, high = heads.chunk(2, dim=-1)
        cos, sin = (table[self.rows.position].double().unsqueeze(1) for table in (self.cos, self.sin))
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def random(case: Case, *shape: int) -> Tensor:
    return torch.randn(shape, device=CUDA).to(case.dtype)


@pytest.fixture(autouse=True)
def hopper() -> None:
    skip_unless_hopper()


def kernel(world: World) -> PageAttention:
    multiprocessors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    plan = plan_pages(world.case.shape, world.case.page_size, multiprocessors)
    assert plan is not None
    return PageAttention(world.case.shape, world.kv, plan, has_norms=world.case.has_norms)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("case", CASES, ids="{0.heads}/{0.kv_heads}x{0.head_dim}p{0.page_size}".format)
def test_as_in_float64_and_the_same_bits_every_time(case: Case, lengths: list[int]) -> None:
    torch.manual_seed(len(lengths))
    world = World(case, lengths)
    expected, key, value = world.expected()
    attend = kernel(world)
    seen = []
    for _ in range(10):
        out = torch.full(
            (len(lengths), case.heads * case.head_dim), float("nan"), dtype=case.dtype, device=CUDA
        )
        attend(0, world.qkv, world.rows, world.norms, EPS, out)
        seen.append(out)
    assert relative_error(seen[0], expected) < TOLERANCE
    assert all(torch.equal(seen[0], again) for again in seen[1:])
    pool = (-1, case.kv_heads, case.head_dim)
    for plane, new in ((world.kv.k[0], key), (world.kv.v[0], value)):
        assert relative_error(plane.view(pool)[world.rows.write_index], new) < TOLERANCE


def padding(world: World, num_rows: int) -> DecodeRows:
    """`world`'s rows and then so many of padding: of one token, in a page that nobody else has."""
    rows, page = world.rows, world.spare_page
    rows.page_table[world.spare_slot, 0] = page

    def padded(x: Tensor, value: int) -> Tensor:
        return torch.cat([x, torch.full((num_rows,), value, dtype=x.dtype, device=CUDA)])

    return rows._replace(
        token=padded(rows.token, 0),
        slot=padded(rows.slot, world.spare_slot),
        position=padded(rows.position, 0),
        write_index=padded(rows.write_index, page * world.case.page_size),
    )


def test_rows_of_padding_leave_the_others_alone() -> None:
    world = World(Case(32, 8, 128), [700, 33])
    attend, rows = kernel(world), padding(world, 62)
    expected, _, _ = world.expected()
    out = torch.full((64, 32 * 128), float("nan"), dtype=torch.bfloat16, device=CUDA)
    qkv = torch.cat([world.qkv, random(world.case, 62, world.qkv.shape[1])])
    attend(0, qkv, rows, None, EPS, out)
    assert relative_error(out[:2], expected) < TOLERANCE
    assert not out[2:].isnan().any()


def test_a_step_leaves_nothing_behind_for_the_next() -> None:
    """Of a row that many blocks have, then of rows that one block has several of, then of the first again."""
    world = World(Case(32, 8, 128), [3, 3000, 16])
    attend, short = kernel(world), padding(world, 61)
    outs = [torch.full((3, 4096), float("nan"), dtype=torch.bfloat16, device=CUDA) for _ in range(2)]
    for out in outs:
        attend(0, world.qkv, world.rows, None, EPS, out)
        short = short._replace(
            position=torch.zeros_like(short.position), slot=short.slot[-1:].expand(64).clone()
        )
        short = short._replace(write_index=short.write_index[-1:].expand(64).clone())
        attend(
            0, random(world.case, 64, 6144), short, None, EPS, torch.empty_like(outs[0]).repeat(22, 1)[:64]
        )
    assert torch.equal(*outs)

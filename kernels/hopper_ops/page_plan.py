"""How the blocks of `page_attention.cu` are laid out. Pure; constants measured on an H200."""

from __future__ import annotations

from typing import NamedTuple

from phloem.kernels.types import DecodeShape

TILE = 16  # keys, as in shares.cuh
MAX_ROWS = 64  # likewise
_MOST_GROUP, _MOST_HEADS = 8, 8  # the matrix units' narrow side; a warp for each KV head
_SHARED_BYTES = 225 << 10  # of a multiprocessor, for rings
_MOST_STAGES = 8
_MOST_EACH = 4  # blocks of a multiprocessor: more would have too few registers


class PagePlan(NamedTuple):
    """blocks: of a launch; per_multiprocessor: of them; stages: tiles in the ring of each; slot_bytes: of a
    tile's keys and values."""

    blocks: int
    per_multiprocessor: int
    stages: int
    slot_bytes: int

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.slot_bytes


def plan_pages(shape: DecodeShape, page_size: int, num_multiprocessors: int) -> PagePlan | None:
    """None where the kernel can't have these heads or pages."""
    heads, group = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
    if group > _MOST_GROUP or heads not in (1, 2, 4, _MOST_HEADS) or page_size % TILE or shape.head_dim % 64:
        return None
    slot_bytes = 2 * TILE * heads * shape.head_dim * 2
    each = min(_MOST_EACH, _MOST_HEADS // heads)
    while True:
        stages = min(_MOST_STAGES, (_SHARED_BYTES // each - 1024) // slot_bytes)
        if stages >= 3:
            return PagePlan(each * num_multiprocessors, each, stages, slot_bytes)
        if each == 1:
            return None
        each //= 2

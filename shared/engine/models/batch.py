"""What the decoder computes in one engine step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from phloem.kernels.types import DevicePlan


class ForwardBatch(NamedTuple):
    """One engine step: T tokens of B sequences, L rows of logits wanted.

    The tokens of a sequence are neighbours, in the order of `query_lens`; each sequence's are the last of
    its `kv_lens` tokens.
    """

    input_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    write_index: Tensor  # int64 [T]: page_id * page_size + offset, where this token's K and V go
    query_lens: Sequence[int] = ()  # host, B entries, at least 1 each, sum T
    kv_lens: Sequence[int] = ()  # host, B entries: keys visible to the last query token (this step included)
    page_table: Tensor | None = None  # int64 [B, max_pages], rows padded with 0
    logits_index: Tensor | None = None  # int64 [L], rows of T whose logits are wanted; None: all
    # By window, from a backend that plans for itself; then the lengths and the page table are not needed.
    plans: Mapping[int, DevicePlan] | None = None
    # Called after each layer's K and V were written (launched), with the number of layers that have theirs.
    on_kv: Callable[[int], None] | None = None

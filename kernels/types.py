"""Values that ops take besides tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

from torch import Tensor


class CudaError(RuntimeError):
    """What NVRTC or the driver said of a kernel of our own."""


class PagedKV(Protocol):
    """K and V pages of every layer, each `[num_pages, page_size, num_kv_heads, head_dim]`."""

    @property
    def k(self) -> list[Tensor]: ...

    @property
    def v(self) -> list[Tensor]: ...


class LinearWeight(NamedTuple):
    """`y = x @ weight.T + bias`; weight `[out, in]`, bias `[out]` or None.

    `packed` says that `weight` is in a layout that only `ops.linear` can read.
    """

    weight: Tensor
    bias: Tensor | None = None
    packed: bool = False


class SequenceSpan(NamedTuple):
    """One sequence of a ragged batch, as attention sees it.

        tokens of the sequence   [0 ............................ kv_len)
        seen by this call        [kv_start ..................... kv_len)
        queries of this step                   [kv_len - query_len, kv_len)
        rows of the step's T     [row, row + query_len)

    `first_page` is the page that holds token `kv_start` when the pages from there on are neighbours in
    the pool, in order: then K and V are views and nothing is copied. Otherwise it is -1 and `page_ids`
    (int64) lists the pages. `skip` is the offset of token `kv_start` in the first of these pages.
    """

    row: int
    query_len: int
    num_keys: int
    skip: int
    first_page: int
    page_ids: Tensor


class AttentionPlan(NamedTuple):
    """What one engine step's attention needs besides q and the pages: made once, used by every layer.

    `window` 0 means that a token sees all tokens before it, otherwise only the last `window` (itself
    included).
    """

    spans: list[SequenceSpan]
    window: int
    max_copied_pages: int  # of one span whose pages are not neighbours
    masks: dict[int, Tensor]  # by row of the span: made by the step's first layer, used by all


class DevicePlan(Protocol):
    """An attention plan of a backend that keeps its own buffers on the device."""

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float) -> Tensor:
        """As `ops.paged_attention`."""


Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh"]  # of a gated projection; gelu: with erf


class DecodeShape(NamedTuple):
    """What the kernels of a decode step need to know of a model."""

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: Activation = "silu"

    def products(self) -> tuple[tuple[Literal["normed", "gated", "adds"], int, int], ...]:
        """Each matrix product of a step: what it does besides, outputs, inputs."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return (
            ("normed", q + 2 * kv, self.hidden_size),
            ("adds", self.hidden_size, q),
            ("gated", self.intermediate_size, self.hidden_size),
            ("adds", self.hidden_size, self.intermediate_size),
            ("normed", self.vocab_size, self.hidden_size),
        )


class DecodeRows(NamedTuple):
    """B sequences with one new token each, on the device; all that changes from step to step.

    token, slot, position, write_index: int64 `[B]`; a negative token stands for `last_token[slot]` (int64
    `[num_slots]`). page_table: int32 `[num_slots, max_pages]`, by slot. work: int32 `[items, 8]`, which
    block of the attention reads which keys (`triton_ops/key_shares.py`). cos, sin: `[max_position, D / 2]`.
    """

    token: Tensor
    slot: Tensor
    position: Tensor
    write_index: Tensor
    last_token: Tensor
    page_table: Tensor
    work: Tensor
    cos: Tensor
    sin: Tensor


class StepLayer(Protocol):
    """A layer's weights, as `DecoderParameters` has them."""

    @property
    def input_norm(self) -> Tensor: ...
    @property
    def qkv(self) -> LinearWeight: ...
    @property
    def q_norm(self) -> Tensor | None: ...
    @property
    def k_norm(self) -> Tensor | None: ...
    @property
    def o(self) -> LinearWeight: ...
    @property
    def post_norm(self) -> Tensor: ...
    @property
    def gate_up(self) -> LinearWeight: ...
    @property
    def down(self) -> LinearWeight: ...


def norms_of(layer: StepLayer) -> tuple[Tensor, Tensor] | None:
    """Of its queries and keys, `[D]` each; None where the model has none."""
    if layer.q_norm is None or layer.k_norm is None:
        return None
    return layer.q_norm, layer.k_norm


class StepWeights(NamedTuple):
    """eps: of the norms."""

    embedding: Tensor
    layers: Sequence[StepLayer]
    final_norm: Tensor
    lm_head: LinearWeight
    eps: float

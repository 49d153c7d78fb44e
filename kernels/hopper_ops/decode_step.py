"""A whole decode step of few rows in one launch on Hopper (`decode_step.cu`), but for its first kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from phloem.kernels.hopper_ops.program import Kernel, Launch, address, compile_file
from phloem.kernels.hopper_ops.tensor_map import INNER, MAP_BYTES, WIDTH, gated_map, map_bytes, rows_map
from phloem.kernels.limits import DECODE_HEAD_DIMS
from phloem.kernels.triton_ops.decode_begin import begin_rows
from phloem.kernels.triton_ops.key_shares import ONE_EACH, num_items
from phloem.kernels.types import DecodeRows, DecodeShape, LinearWeight, PagedKV, StepWeights

MAX_ROWS = 8  # the matrix units' narrow side; more are faster in launches of their own
_HEADERS = ("ptx.cuh", "step.cuh", "products.cuh", "attention.cuh")
_SHARED_BYTES = 227 << 10  # of a block, at most
_ALIGNMENT = 1024  # of the ring
_OTHERS = 1536  # bytes of shared memory beside the ring and what attention and products share, at most
_POOL_BYTES = 8192  # of products
_WARPS, _TILE = 8, 16  # of a block, without those that bring; rows of a weight
_TILES = 2  # of a unit
_SIZES = (2, MAX_ROWS)  # kernels, by rows: the fewer, the longer is the ring
_MAX_GROUP, _MAX_QUERY_WIDTH = 8, 1024  # of a KV head: its queries and their sums are in registers
_LOG2_E = 1.4426950408889634
_NORMED, _GATED, _ADDS, _ATTENDS = range(4)
_MAX_TRACED = 512  # phases
_INPUTS = 3  # of products: kinds of x


class LaunchPlan(NamedTuple):
    """blocks: all resident at once; shared_bytes: for the ring of each."""

    blocks: int
    shared_bytes: int

    def stages(self, num_rows: int) -> int:
        """Units in the ring, with room for so many rows of x in each."""
        return (self.shared_bytes - _ALIGNMENT) // ((_TILES * _TILE + num_rows) * WIDTH * 2)


def plan_step(shape: DecodeShape, num_multiprocessors: int) -> LaunchPlan | None:
    """None where tiles don't divide a weight, or a KV head's queries don't fit into registers."""
    group = shape.num_heads // shape.num_kv_heads
    width = group * shape.head_dim
    if group > _MAX_GROUP or width > _MAX_QUERY_WIDTH or shape.head_dim not in DECODE_HEAD_DIMS:
        return None
    weights = [(2 * n if product == "gated" else n, k) for product, n, k in shape.products()]
    if any(n % _TILE or k % INNER for n, k in weights):
        return None
    attention = 4 * _WARPS * (width + 2 * group)

    def inputs_of_busiest(blocks: int) -> int:
        return sum(-(-n // _TILE // blocks) * k for n, k in weights[:-1])  # a layer's, without the vocabulary

    # As few as have the same work at most: equal shares take equally long.
    blocks = min(range(num_multiprocessors * 7 // 8, num_multiprocessors + 1), key=inputs_of_busiest)
    return LaunchPlan(blocks, _SHARED_BYTES - _OTHERS - max(attention, _POOL_BYTES))


class OneLaunchStep:
    """The step of one model over one KV cache. A captured graph keeps its buffers: it must outlive it.

    All its blocks wait for each other, so that it starts when all fit at once. Where something else may hold
    a multiprocessor for long, as a KV transfer with a peer that hangs, it is the wrong kernel.
    """

    sharing = ONE_EACH

    def __init__(
        self,
        shape: DecodeShape,
        weights: StepWeights,
        kv: PagedKV,
        plan: LaunchPlan,
        *,
        trace: bool = False,
    ) -> None:
        """`plan` is `plan_step`'s; with `trace` the kernel notes times (benchmarks/trace_decode_step.py)."""
        device, dtype = weights.embedding.device, weights.embedding.dtype
        self._weights, self._kv, self._plan = weights, kv, plan
        self._scale_log2 = shape.head_dim**-0.5 * _LOG2_E
        queries = shape.num_heads * shape.head_dim

        def empty(width: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros((MAX_ROWS, width), dtype=dtype, device=device)

        self._residual, self._scaled = empty(shape.hidden_size), empty(shape.hidden_size)
        # Two bytes of a word's tag for each of its data; no launch has tag 0.
        self._qkv = empty(2 * (queries + 2 * shape.num_kv_heads * shape.head_dim))
        self._attended, self._gated = empty(queries), empty(shape.intermediate_size)
        self._logits = empty(shape.vocab_size, torch.float32)
        self._squares = empty(shape.hidden_size // _TILE, torch.float32)
        items = num_items(MAX_ROWS, shape.num_kv_heads)
        self._item_sums = torch.zeros(items * queries * 2, dtype=torch.float32, device=device)
        self._item_stats = torch.zeros(items * shape.num_heads * 4, dtype=torch.float32, device=device)
        self._launch = torch.ones(1, dtype=torch.int64, device=device)

        maps: list[bytes] = []
        phases = list(self._phases(maps))
        assert not trace or len(phases) <= _MAX_TRACED, "the trace has no room for so many layers"
        self._phase_table = _on_device(b"".join(phases), device)
        self._num_phases = len(phases)
        self._ended = torch.zeros(len(phases) + 1, dtype=torch.int32, device=device)
        self._w_maps = _on_device(b"".join(maps), device)
        inputs = (self._scaled, self._attended, self._gated)
        x_maps = [map_bytes(rows_map(x, rows)) for rows in range(1, MAX_ROWS + 1) for x in inputs]
        self._x_maps = _on_device(b"".join(x_maps), device)
        self.kernels = {
            size: _compile(_defines(shape, weights, kv, plan, size, trace), device, plan) for size in _SIZES
        }

    def takes(self, num_rows: int) -> bool:
        return num_rows <= MAX_ROWS

    def __call__(self, rows: DecodeRows) -> Tensor:
        """Writes the rows' K and V into their pages. Returns float32 logits `[B, vocab]`, there until the
        next step."""
        count, weights = len(rows.token), self._weights
        begin_rows(
            rows.token,
            rows.slot,
            rows.last_token,
            weights.embedding,
            weights.layers[0].input_norm,
            self._residual,
            self._scaled,
            self._squares,
        )
        arguments = _Step(
            self._phase_table.data_ptr(),
            self._w_maps.data_ptr(),
            self._x_maps.data_ptr() + (count - 1) * _INPUTS * MAP_BYTES,
            self._ended.data_ptr(),
            rows.work.data_ptr(),
            rows.page_table.data_ptr(),
            rows.write_index.data_ptr(),
            rows.cos.data_ptr(),
            rows.sin.data_ptr(),
            self._item_sums.data_ptr(),
            self._item_stats.data_ptr(),
            self._launch.data_ptr(),
            self._num_phases,
            count,
            len(rows.work),
            rows.page_table.stride(0),
            weights.eps,
            self._scale_log2,
        )
        kernel = next(kernel for size, kernel in self.kernels.items() if count <= size)
        kernel(_launch(self._plan), ((arguments,), (None,)))
        return self._logits[:count]

    def _phases(self, maps: list[bytes]) -> Iterator[bytes]:
        """The table, in order; appends the tensor maps of the weights."""
        weights = self._weights
        scaled, attended, gated = range(_INPUTS)  # as in the maps of x
        gains = [layer.input_norm for layer in weights.layers[1:]] + [weights.final_norm]
        hidden = self._scaled.shape[1]
        num_squares = 1  # of the first kernel

        def normed(w: LinearWeight, out: Tensor, kind: int = _NORMED) -> bytes:
            maps.append(map_bytes((gated_map if kind == _GATED else rows_map)(w.weight, _TILE)))
            n = len(w.weight) // (2 if kind == _GATED else 1)
            is_float, in_words = out.dtype == torch.float32, out is self._qkv
            ints = (kind, is_float, n, hidden, scaled, len(maps) - 1, num_squares, in_words)
            return _pack(ints, bias=w.bias, squares=self._squares, out=out)

        def adds(w: LinearWeight, x: int, gain: Tensor) -> bytes:
            maps.append(map_bytes(rows_map(w.weight, _TILE)))
            ints = (_ADDS, False, *w.weight.shape, x, len(maps) - 1, 0, False)
            stream = {"residual": self._residual, "out": self._scaled, "squares_out": self._squares}
            return _pack(ints, bias=w.bias, gain=gain, **stream)

        for index, (layer, next_gain) in enumerate(zip(weights.layers, gains, strict=True)):
            yield normed(layer.qkv, self._qkv)
            yield _pack(
                (_ATTENDS, 0, 0, 0, 0, 0, 0, 0),
                k_pages=self._kv.k[index],
                v_pages=self._kv.v[index],
                out=self._attended,
                x=self._qkv,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
            )
            yield adds(layer.o, attended, layer.post_norm)
            num_squares = hidden // _TILE
            yield normed(layer.gate_up, self._gated, _GATED)
            yield adds(layer.down, gated, next_gain)
        yield normed(weights.lm_head, self._logits)


def _defines(
    shape: DecodeShape, weights: StepWeights, kv: PagedKV, plan: LaunchPlan, max_rows: int, trace: bool
) -> dict[str, int]:
    return {
        "HALF": int(weights.embedding.dtype == torch.float16),
        "MAX_ROWS": max_rows,
        "STAGES": plan.stages(max_rows),
        "HEAD_DIM": shape.head_dim,
        "GROUP": shape.num_heads // shape.num_kv_heads,
        "KV_HEADS": shape.num_kv_heads,
        "PAGE_SIZE": kv.k[0].shape[1],
        "QK_NORM": int(weights.layers[0].q_norm is not None),
        **({"TRACE": 1} if trace else {}),
    }


def _compile(defines: Mapping[str, int], device: torch.device, plan: LaunchPlan) -> Kernel:
    image = compile_file("decode_step.cu", _HEADERS, defines)
    return Kernel(image, "decode_step", device, _launch(plan))


def _launch(plan: LaunchPlan) -> Launch:
    return Launch(plan.blocks, 32 * (_WARPS + 2), plan.shared_bytes, cooperative=True)


class _Step(ctypes.Structure):
    """`Step` of decode_step.cu."""

    _fields_ = [
        *((f"pointer_{index}", ctypes.c_void_p) for index in range(12)),
        *((f"int_{index}", ctypes.c_int) for index in range(4)),
        *((f"float_{index}", ctypes.c_float) for index in range(2)),
    ]


assert ctypes.sizeof(_Step) == 120, "as in step.cuh"
_PHASE_BYTES = 128
_POINTERS = (
    "bias", "squares", "residual", "gain", "out", "squares_out", "x", "q_norm", "k_norm",
    "k_pages", "v_pages",
)  # fmt: skip


def _pack(ints: tuple[int, ...], **tensors: Tensor | None) -> bytes:
    """`Phase` of decode_step.cu: eight ints, then addresses by name, 0 for none."""
    found = [tensors.pop(name, None) for name in _POINTERS]
    assert len(ints) == 8 and not tensors
    addresses = [address(tensor) for tensor in found]
    packed = np.array([*map(int, ints)], np.int32).tobytes() + np.array(addresses, np.uint64).tobytes()
    return packed.ljust(_PHASE_BYTES, b"\0")


def _on_device(data: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)

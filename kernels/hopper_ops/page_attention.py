"""Attention of one new token of each row over paged K and V, at the speed of memory (`page_attention.cu`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from phloem.kernels.hopper_ops.page_plan import MAX_ROWS, PagePlan
from phloem.kernels.hopper_ops.program import Kernel, Launch, address, compile_file
from phloem.kernels.hopper_ops.tensor_map import MAP_BYTES, map_bytes, map_field, tiles_map
from phloem.kernels.types import DecodeRows, DecodeShape, PagedKV

_HEADERS = ("ptx.cuh", "wgmma.cuh", "shares.cuh", "page_step.cuh", "new_tokens.cuh", "sums.cuh")
_LOG2_E = 1.4426950408889634


class _Rows(ctypes.Structure):
    """`Rows` of shares.cuh."""

    _fields_ = [
        *((f"pointer_{index}", ctypes.c_void_p) for index in range(3)),
        *((f"int_{index}", ctypes.c_int) for index in range(4)),
    ]


class PageAttention:
    """The kernel of one model over one KV cache, with what its launches share. It must outlive every graph
    that holds one of them."""

    def __init__(
        self, shape: DecodeShape, kv: PagedKV, plan: PagePlan, *, has_norms: bool, trace: bool = False
    ) -> None:
        """Raises CudaError where the kernel can't be made or run."""
        device, dtype = kv.k[0].device, kv.k[0].dtype
        self._shape, self._kv, self.plan = shape, kv, plan
        defines = {
            "HALF": int(dtype == torch.float16),
            "HEAD_DIM": shape.head_dim,
            "GROUP": shape.num_heads // shape.num_kv_heads,
            "KV_HEADS": shape.num_kv_heads,
            "QK_NORM": int(has_norms),
            "STAGES": plan.stages,
            "PER_MULTIPROCESSOR": plan.per_multiprocessor,
            **({"TRACE": 1} if trace else {}),
        }
        image = compile_file("page_attention.cu", _HEADERS, defines)
        self._launch = Launch(plan.blocks, 32 * (shape.num_kv_heads + 1), plan.shared_bytes, dependent=True)
        # Its blocks don't wait for each other: one at a time would do.
        self.kernel = Kernel(image, "page_attention", device, self._launch._replace(num_blocks=1))
        cells = 2 * plan.blocks * shape.num_kv_heads
        self._parts = torch.empty((cells, shape.head_dim // 16, 32, 4), dtype=torch.float32, device=device)
        self._stats = torch.empty((cells, 4, 4), dtype=torch.float32, device=device)
        self._arrivals = torch.zeros((MAX_ROWS, shape.num_kv_heads), dtype=torch.int32, device=device)
        self._maps = [(_map(k), _map(v)) for k, v in zip(kv.k, kv.v, strict=True)]

    def __call__(
        self,
        layer: int,
        qkv: Tensor,
        rows: DecodeRows,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        out: Tensor,
    ) -> None:
        """Rotates, writes K and V, and attends. qkv `[B, (H + 2 * H_kv) * D]`, norms of q and k `[D]` each,
        out `[B, H * D]`."""
        k_map, v_map = self._maps[layer]
        q_norm, k_norm = norms if norms is not None else (None, None)
        tensors = (
            qkv, rows.cos, rows.sin, q_norm, k_norm, rows.write_index, self._kv.k[layer], self._kv.v[layer],
            out, self._parts, self._stats, self._arrivals,
        )  # fmt: skip
        arguments = _Attention(
            map_field(k_map),
            map_field(v_map),
            self._rows(rows),
            *(address(tensor) for tensor in tensors),
            eps,
            self._shape.head_dim**-0.5 * _LOG2_E,
            layer,
        )
        self.kernel(self._launch, ((arguments,), (None,)))

    def _rows(self, rows: DecodeRows) -> _Rows:
        return _Rows(
            rows.slot.data_ptr(),
            rows.position.data_ptr(),
            rows.page_table.data_ptr(),
            len(rows.token),
            rows.page_table.stride(0),
            self._kv.k[0].shape[1],
        )


class _Attention(ctypes.Structure):
    """`Attention` of page_attention.cu."""

    _fields_ = [
        ("k", ctypes.c_ubyte * MAP_BYTES),
        ("v", ctypes.c_ubyte * MAP_BYTES),
        ("rows", _Rows),
        *((f"pointer_{index}", ctypes.c_void_p) for index in range(12)),
        ("eps", ctypes.c_float),
        ("scale_log2", ctypes.c_float),
        ("layer", ctypes.c_int),
        ("unused", ctypes.c_ubyte * 44),
    ]


assert ctypes.sizeof(_Attention) == 448, "as in page_attention.cu"


def _map(pages: Tensor) -> bytes:
    return map_bytes(tiles_map(pages))

"""What Hopper's tensor memory accelerator has to know of a matrix that it copies tiles of."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from phloem.kernels.hopper_ops.page_plan import TILE
from phloem.kernels.hopper_ops.program import bindings, checked

MAP_BYTES = 128
INNER = 64  # elements of a box's row: 128 bytes, what one swizzle spans
WIDTH = 256  # elements of each row of the matrix in a box of `decode_step.cu`: four such rows


def rows_map(matrix: Tensor, box_rows: int, width: int = WIDTH) -> Any:
    """Boxes `[width / 64, box_rows, 64]` of a dense `[N, K]`, K whole 64s; zeros beyond N and K."""
    n, k = matrix.shape
    return _encode(matrix, (INNER, n, k // INNER), (k, INNER), (INNER, box_rows, width // INNER))


def halves_map(weight: Tensor, box_rows: int, width: int) -> Any:
    """Boxes `[width / 64, 2, box_rows / 2, 64]` of a dense `[2 * N, K]`, gate first: rows of both."""
    n, k = weight.shape[0] // 2, weight.shape[1]
    sizes, strides = (INNER, n, 2, k // INNER), (k, n * k, INNER)
    return _encode(weight, sizes, strides, (INNER, box_rows // 2, 2, width // INNER))


def gated_map(weight: Tensor, box_rows: int) -> Any:
    """Likewise of a dense `[2 * N, K]`, gate first; 8 rows of the gate and 8 of the rest take turns."""
    n, k = weight.shape[0] // 2, weight.shape[1]
    sizes, strides = (INNER, 8, 2, n // 8, k // INNER), (k, n * k, 8 * k, INNER)
    return _encode(weight, sizes, strides, (INNER, 8, 2, box_rows // 16, WIDTH // INNER))


def tiles_map(pages: Tensor) -> Any:
    """Boxes `[H_kv, D / 64, 16, 64]` of 16 tokens of a pool `[num_pages, page_size, H_kv, D]`."""
    num_pages, page_size, heads, dim = pages.shape
    sizes, strides = (INNER, num_pages * page_size, dim // INNER, heads), (heads * dim, INNER, dim)
    return _encode(pages, sizes, strides, (INNER, TILE, dim // INNER, heads))


def _encode(matrix: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> Any:
    """sizes and strides in elements, the inner dimension first, whose stride is 1."""
    assert matrix.is_contiguous() and matrix.data_ptr() % 16 == 0, "tiles are copied from dense rows"
    driver = bindings("driver")
    kinds = driver.CUtensorMapDataType
    bfloat16, float16 = kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    return checked(
        driver.cuTensorMapEncodeTiled(
            bfloat16 if matrix.dtype == torch.bfloat16 else float16,
            len(sizes),
            matrix.data_ptr(),
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(stride * matrix.element_size()) for stride in strides],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1)] * len(sizes),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,  # 256 and none: 9% less
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def map_field(data: bytes) -> Any:
    """`map_bytes` for a structure with such a field."""
    return (ctypes.c_ubyte * MAP_BYTES).from_buffer_copy(data)


def map_bytes(tensor_map: Any) -> bytes:
    """What a kernel reads; on the device it is aligned to 64 bytes."""
    return ctypes.string_at(tensor_map.getPtr(), MAP_BYTES)

"""Linear projections, with weights laid out for the device once, at load.

On a CPU a decode step multiplies few rows by large matrices, and the layout decides how fast that is:

- `packed`, oneDNN's own blocked layout: bfloat16 (plain weights are reordered in every call, which doubles
  its time), and large float32 matrices (8 rows in half the time). A call costs 20 us whatever the size.
- float32 with columns contiguous, for small matrices: BLAS reads that up to twice as fast as rows contiguous
  when there are 4 to 16 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from phloem.kernels.types import LinearWeight

# oneDNN chooses the blocked layout for about this many rows; it serves one row and a thousand as well.
_PACK_ROWS = 64
# float32 matrices with fewer elements are quicker by BLAS than oneDNN's call takes.
_PACK_FLOAT32_ELEMENTS = 1_500_000
# Up to this many rows, weights that had to stay plain are the left factor: nothing is reordered.
_FEW_ROWS = 16


def prepare_linear(plain: LinearWeight, *, shared: bool) -> LinearWeight:
    weight = plain.weight
    if weight.device.type != "cpu":
        return plain
    if not shared and _gains_from_packing(weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        return plain._replace(weight=packed, packed=True)
    if weight.dtype == torch.float32:
        return plain._replace(weight=weight.t().contiguous().t())
    return plain


def _gains_from_packing(weight: Tensor) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.float32:
        return weight.numel() >= _PACK_FLOAT32_ELEMENTS
    return weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(x: Tensor, w: LinearWeight) -> Tensor:
    if w.packed:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, w.weight, w.bias, "none", [], "")
        return product
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and 0 < x.shape[0] <= _FEW_ROWS:
        return _few_rows(x, w)
    return functional.linear(x, w.weight, w.bias)


def _few_rows(x: Tensor, w: LinearWeight) -> Tensor:
    product = torch.mv(w.weight, x[0]).unsqueeze(0) if x.shape[0] == 1 else torch.mm(w.weight, x.t()).t()
    return product if w.bias is None else product + w.bias

"""Linear projections, with weights laid out for the device once, at load.

On a CPU a decode step multiplies few rows by large matrices, and the layout decides how fast that is:

- bfloat16: oneDNN's own blocked layout (`packed`). Given plain weights it reorders them in every call.
- float32: columns contiguous. BLAS reads that twice as fast as rows contiguous when there are 4 to 16 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from phloem.kernels.types import LinearWeight

# oneDNN chooses the blocked layout for about this many rows; it serves one row and a thousand as well.
_PACK_ROWS = 64
# Up to this many rows, weights that had to stay plain are the left factor: nothing is reordered.
_FEW_ROWS = 16


def prepare_linear(plain: LinearWeight) -> LinearWeight:
    weight = plain.weight
    if weight.device.type != "cpu":
        return plain
    if weight.dtype == torch.float32:
        return plain._replace(weight=weight.t().contiguous().t())
    if weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        return plain._replace(weight=packed, packed=True)
    return plain


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

"""The work of a step of the decode attention, as an engine would cut it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from phloem.kernels.triton_ops.key_shares import (
    FIELDS,
    MANY,
    Sharing,
    make_items,
    num_items,
    share_size,
)


def key_work(slots: Tensor, kv_lens: Tensor, num_kv_heads: int, sharing: Sharing = MANY) -> Tensor:
    """slots, kv_lens int64 `[B]`, the new token counted. Returns int32 `[num_items, FIELDS]`."""
    work = np.zeros((num_items(len(slots), num_kv_heads), FIELDS), dtype=np.int32)
    lengths = kv_lens.numpy()
    make_items(slots.numpy(), lengths, share_size(lengths, num_kv_heads, sharing), work)
    return torch.from_numpy(work)

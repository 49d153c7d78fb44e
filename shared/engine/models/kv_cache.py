"""The tensors that hold the keys and values of all pages."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phloem.shared.model_store.model_config import ModelConfig


class KVCache(NamedTuple):
    """One K and one V tensor per layer, each `[num_pages, page_size, num_kv_heads, head_dim]`, contiguous."""

    k: list[Tensor]
    v: list[Tensor]

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Room for `num_pages` pages, not initialised: no token is read before it was written. On a CPU the
        system backs memory when it is first written, so an unused pool costs nothing."""
        shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)
        make = torch.empty if device.type == "cpu" else torch.zeros
        k = [make(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        v = [make(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        return cls(k, v)

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.k[0].shape[1]


def bytes_per_page(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page, K and V of all layers."""
    token_bytes = config.num_kv_heads * config.head_dim * dtype.itemsize
    return 2 * config.num_layers * page_size * token_bytes

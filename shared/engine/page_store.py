"""The KV tensors behind page ids, as hand-overs see them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.shared.engine.models.kv_cache import KVCache


class KVPageStore:
    """Gathers and scatters pages of one `KVCache`; the engine's thread orders this after its launches."""

    def __init__(self, kv: KVCache, device: torch.device) -> None:
        self._kv = kv
        self._device = device
        self.num_layers = len(kv.k)
        page = kv.k[0][0]
        self.layer_page_bytes = 2 * page.numel() * page.element_size()

    @torch.inference_mode()
    def gather(self, page_ids: Sequence[int], layer_start: int, layer_end: int, out: Tensor) -> int:
        return ops.gather_pages(self._kv, self._index(page_ids), layer_start, layer_end, out)

    @torch.inference_mode()
    def scatter(self, page_ids: Sequence[int], layer_start: int, layer_end: int, data: Tensor) -> int:
        return ops.scatter_pages(self._kv, self._index(page_ids), layer_start, layer_end, data)

    def _index(self, page_ids: Sequence[int]) -> Tensor:
        return torch.tensor(page_ids, dtype=torch.int64, device=self._device)

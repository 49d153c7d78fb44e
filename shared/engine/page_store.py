"""The KV tensors of a CPU behind page ids, as hand-overs see them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.shared.engine.handover import PageStore
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.transfer.pending import Incoming, Moved, MovedNow


def page_store(kv: KVCache, device: torch.device) -> PageStore:
    """The store for where `kv` is."""
    if device.type == "cuda":
        from phloem.shared.engine.cuda_page_store import CudaPageStore

        return CudaPageStore(kv, device)
    return KVPageStore(kv)


class KVPageStore:
    """Gathers and scatters pages of one `KVCache` at once, in the calling thread; see `PageStore`."""

    def __init__(self, kv: KVCache) -> None:
        self._kv = kv
        self.num_layers = len(kv.k)
        self.layer_page_bytes = layer_page_bytes(kv)

    @torch.inference_mode()
    def gather(
        self, page_ids: Sequence[int], layer_start: int, layer_end: int, out: Tensor, beside: int = 0
    ) -> Moved:
        del beside
        return MovedNow(ops.gather_pages(self._kv, torch.tensor(page_ids), layer_start, layer_end, out))

    @torch.inference_mode()
    def scatter(
        self,
        page_ids: Sequence[int],
        layer_start: int,
        layer_end: int,
        data: Tensor,
        after: Incoming | None = None,
        beside: int = 0,
    ) -> Moved:
        del beside
        assert after is None, "a CPU waits for nothing by itself"
        return MovedNow(ops.scatter_pages(self._kv, torch.tensor(page_ids), layer_start, layer_end, data))

    def fence(self) -> None:
        pass

    def withdraw(self, scatters: Iterable[Moved]) -> None:
        del scatters


def layer_page_bytes(kv: KVCache) -> int:
    """K and V of one page in one layer."""
    page = kv.k[0][0]
    return 2 * page.numel() * page.element_size()

"""A model whose logits are rows of a table, chosen by token and position: nothing is rounded, so tokens are
equal on every device. It writes no K and V, but answers a decode row whose page table and write index do not
fit with a token that nothing else gives."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.kernels.types import DecodeRows
from phloem.shared.engine.models.batch import ForwardBatch
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.protocol.session import SamplingParams

VOCAB = 5000
_ROWS = 61

Number = TypeVar("Number", int, Tensor)


class TableModel:
    """Both of the runner's models: `Forward` and `DecodeForward`."""

    def __init__(self, device: torch.device, page_size: int) -> None:
        generator = torch.Generator().manual_seed(17)
        table = torch.randn((_ROWS, VOCAB), generator=generator) * 3
        table[:, 0] = -100.0  # token 0 says that something was wrong
        self._host_table = table
        self._table = table.to(device)
        self._page_size = page_size

    def forward(self, batch: ForwardBatch | DecodeRows, kv: KVCache) -> Tensor:
        if isinstance(batch, ForwardBatch):
            logits = self._logits(batch.input_ids, batch.positions)
            return logits if batch.logits_index is None else logits[batch.logits_index]
        return self._decode(batch)

    def answer(self, prompt: list[int], sampling: SamplingParams) -> list[int]:
        """What a request is answered."""
        known = list(prompt)
        for _ in range(sampling.max_tokens):
            row = self._host_table[_row_of(known[-1], len(known) - 1)].unsqueeze(0)
            drawn = ops.sample(
                row,
                torch.tensor([sampling.temperature]),
                torch.tensor([sampling.top_k]),
                torch.tensor([sampling.top_p]),
                torch.tensor([sampling.min_p]),
                torch.tensor([sampling.seed]),
                torch.tensor([len(known)]),
            )
            known.append(int(drawn))
        return known[len(prompt) :]

    def _decode(self, rows: DecodeRows) -> Tensor:
        tokens = torch.where(rows.token < 0, rows.last_token[rows.slot], rows.token)
        items = rows.work.long()
        # One item per row: these are short. Items of no row go to a row behind the last.
        count = len(tokens)
        index = torch.where(items[:, 0] < 0, count, items[:, 0])
        positions = torch.zeros(count + 1, dtype=torch.int64, device=tokens.device)
        positions.scatter_(0, index, items[:, 2])
        positions = positions[:count]
        pages = rows.page_table[rows.slot, positions // self._page_size].long()
        fits = pages * self._page_size + positions % self._page_size == rows.write_index
        logits = self._logits(tokens, positions)
        logits[:, 0] = torch.where(fits, logits[:, 0], 1000.0)
        return logits

    def _logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self._table[_row_of(tokens, positions)]


def _row_of(token: Number, position: Number) -> Number:
    return (token * 31 + position * 7) % _ROWS

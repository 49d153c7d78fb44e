"""The tokens that steps made, on their way to the host: pinned memory that steps take turns on."""

from __future__ import annotations

import torch

from phloem.shared.engine.cuda_calls import DeviceCalls
from phloem.shared.engine.cuda_inputs import RING


class StepResults:
    """`tokens` is int64 `[RING, max_rows]`; sampling writes row `turn` of it, from the device. A turn comes
    again when the step that had it was collected."""

    def __init__(self, device: torch.device, max_rows: int, calls: DeviceCalls) -> None:
        self.tokens = torch.zeros((RING, max_rows), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._on_host = self.tokens.numpy()
        self._marks = [calls.mark() for _ in range(RING)]
        self._turn = 0

    def next_turn(self) -> int:
        self._turn = (self._turn + 1) % RING
        return self._turn

    def launched(self, turn: int) -> None:
        """All that writes the turn's tokens was launched."""
        self._marks[turn].record()

    def ready(self, turn: int) -> bool:
        return self._marks[turn].query()

    def wait(self, turn: int, num_rows: int) -> list[int]:
        """The tokens of the first rows, when they are there."""
        self._marks[turn].synchronize()
        ids: list[int] = self._on_host[turn, :num_rows].tolist()
        return ids

"""Runs a step plan on the device: batch tensors from slots, forward pass, sampling.

All state that lives across steps is indexed by slot: the page table, the last sampled token, the sampling
parameters. A launch reads token ids from the host where they are known and from the slot's last-token
buffer where they are still on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.shared.engine.grammar.masks import TokenMasks
from phloem.shared.engine.models.batch import ForwardBatch
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.slot_table import SlotTable
from phloem.shared.engine.step_plan import Row, StepPlan
from phloem.shared.transfer.pending import DONE, Pending


class LaunchedStep(Protocol):
    """A step that the device was given."""

    def ready(self) -> bool:
        """Whether `token_ids` returns without waiting."""

    def token_ids(self) -> list[int]:
        """One token for each row that samples, in order of the rows; waits for the device."""

    def sample(self, masks: TokenMasks) -> None:
        """The second phase of a step with constrained rows, exactly once, when the tokens of the step before
        are known and before another step is launched. Other steps are sampled when they are launched."""


class LayerWatch(NamedTuple):
    """Somebody wants to know when the K and V of a step's first layers are in their pages.

    `reached` is called in the course of a launch, once for each of `layer_ends` (ascending, the last is the
    number of layers), with something that is done when layers [0, layer_end) are there.
    """

    layer_ends: Sequence[int]
    reached: Callable[[int, Pending], None]

    def on_kv(self, mark: Callable[[], Pending]) -> Callable[[int], None]:
        """For `ForwardBatch`; `mark` makes a `Pending` of all that was launched by then."""

        def written(layer_end: int) -> None:
            if layer_end in self.layer_ends:
                self.reached(layer_end, mark())

        return written

    def all_at(self, mark: Pending) -> None:
        """For a step that is launched as a whole."""
        for layer_end in self.layer_ends:
            self.reached(layer_end, mark)


class StepRunner(Protocol):
    """What the engine loop drives; the tests have one without a model."""

    def launch(self, plan: StepPlan, watch: LayerWatch | None = None) -> LaunchedStep: ...


class Forward(Protocol):
    """The model: `phloem.shared.engine.models.decoder.Decoder`."""

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor: ...


class SyncStep:
    """A step of a device whose launches are synchronous: it is ready when it is sampled."""

    def __init__(self, draw: Callable[[TokenMasks | None], list[int]]) -> None:
        self._draw = draw
        self._token_ids: list[int] | None = None

    def sample(self, masks: TokenMasks | None = None) -> None:
        self._token_ids = self._draw(masks)

    def ready(self) -> bool:
        return self._token_ids is not None

    def token_ids(self) -> list[int]:
        assert self._token_ids is not None, "a step is sampled before it is collected"
        return self._token_ids


class SyncStepRunner:
    """The model on a device whose launches are synchronous: a launch computes, and its step is ready."""

    def __init__(
        self, model: Forward, kv: KVCache, device: torch.device, *, num_slots: int, max_pages: int
    ) -> None:
        self._model = model
        self._kv = kv
        self._device = device
        self._page_size = kv.page_size
        self._slots = SlotTable(num_slots, max_pages)
        self._last_token = torch.zeros(num_slots, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, watch: LayerWatch | None = None) -> SyncStep:
        for row in plan.rows:
            self._slots.bind(row.request)
        slots = np.fromiter((row.request.slot for row in plan.rows), np.int64, len(plan.rows))
        batch = self._batch(plan.rows, slots)
        if watch is not None:
            batch = batch._replace(on_kv=watch.on_kv(lambda: DONE))
        logits = self._model.forward(batch, self._kv)
        step = SyncStep(partial(self._draw, logits, [row for row in plan.rows if row.samples]))
        if not plan.constrained:
            step.sample()
        return step

    @torch.inference_mode()
    def _draw(self, logits: Tensor, rows: list[Row], masks: TokenMasks | None) -> list[int]:
        if not rows:
            return []
        if masks is not None:
            ops.apply_bitmask(logits, masks.bitmask, masks.rows)
        tokens: list[int] = self._sample(logits, rows).tolist()
        return tokens

    def _batch(self, rows: list[Row], slots: np.ndarray) -> ForwardBatch:
        starts = np.fromiter((row.start for row in rows), np.int64, len(rows))
        counts = np.fromiter((row.num_tokens for row in rows), np.int64, len(rows))
        ends = np.cumsum(counts)
        offsets = np.repeat(starts - (ends - counts), counts)
        positions = offsets + np.arange(ends[-1])
        write_index = self._slots.write_index(np.repeat(slots, counts), positions, self._page_size)
        kv_lens = starts + counts
        max_pages = int(-(-kv_lens.max() // self._page_size))
        last = ends - 1
        samples = np.fromiter((row.samples for row in rows), bool, len(rows))
        return ForwardBatch(
            input_ids=self._input_ids(rows, last),
            positions=self._put(positions),
            write_index=self._put(write_index),
            query_lens=counts.tolist(),
            kv_lens=kv_lens.tolist(),
            page_table=self._put(self._slots.page_ids[slots, :max_pages].astype(np.int64)),
            logits_index=self._put(last[samples]),
        )

    def _input_ids(self, rows: list[Row], last: np.ndarray) -> Tensor:
        tokens: list[int] = []
        for row in rows:
            if row.from_device:
                tokens.append(0)
            elif row.num_tokens == 1:
                tokens.append(row.request.token_ids[row.start])
            else:
                tokens += row.request.token_ids[row.start : row.start + row.num_tokens]
        input_ids = torch.tensor(tokens, dtype=torch.int64, device=self._device)
        on_device = [i for i, row in enumerate(rows) if row.from_device]
        if on_device:
            slots = torch.tensor([rows[i].request.slot for i in on_device], device=self._device)
            input_ids[self._put(last[on_device])] = self._last_token[slots]
        return input_ids

    def _sample(self, logits: Tensor, rows: list[Row]) -> Tensor:
        slots = np.fromiter((row.request.slot for row in rows), np.int64, len(rows))
        positions = np.fromiter((row.start + row.num_tokens for row in rows), np.int64, len(rows))
        table = self._slots
        tokens = ops.sample(
            logits,
            self._put(table.temperature[slots]),
            self._put(table.top_k[slots]),
            self._put(table.top_p[slots]),
            self._put(table.min_p[slots]),
            self._put(table.seed[slots]),
            self._put(positions),
        )
        self._last_token[self._put(slots)] = tokens
        return tokens

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

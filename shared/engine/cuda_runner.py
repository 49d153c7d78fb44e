"""Runs step plans on a CUDA device that stays ahead of the host.

A launch only enqueues: inputs come from pinned buffers, unknown input tokens from the slot's last-token
buffer on the device, and the step's tokens go into pinned memory. Steps of decode rows alone replay a CUDA
graph captured for the next larger batch size, which ends with sampling: one copy, one replay and one event
are all that they ask of CUDA. A step with prompt chunks runs eagerly.

    rows of a step:  [ decode rows, one token each | chunk rows ]      scheduler's order
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.kernels.types import DecodeRows
from phloem.shared.engine.cooperative_steps import CooperativeSteps
from phloem.shared.engine.cuda_attention import CudaAttention, PlannedRows
from phloem.shared.engine.cuda_calls import Captured, CudaCalls, DeviceCalls
from phloem.shared.engine.cuda_inputs import RowInputs
from phloem.shared.engine.decode_tables import DecodeTables
from phloem.shared.engine.decode_upload import DecodeInputs
from phloem.shared.engine.grammar.masks import TokenMasks
from phloem.shared.engine.models.batch import ForwardBatch
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.step_inputs import RunnerSizes, SampledRows, StepInputs
from phloem.shared.engine.step_plan import DecodeStep, Row, StepPlan
from phloem.shared.engine.step_results import StepResults
from phloem.shared.engine.step_runner import Forward, LayerWatch
from phloem.shared.transfer.device_event import DeviceEvent

_EMPTY = np.zeros(0, dtype=np.int64)


class CudaStep:
    """A launched step. `sample` is called once: with what a graph has sampled already, it only takes note."""

    def __init__(
        self, results: StepResults, turn: int, num_rows: int, draw: Callable[[TokenMasks | None], None]
    ) -> None:
        self._results = results
        self._turn = turn
        self._num_rows = num_rows
        self._draw = draw
        self._is_sampled = False

    def sample(self, masks: TokenMasks | None = None) -> None:
        self._draw(masks)
        self._results.launched(self._turn)
        self._is_sampled = True

    def ready(self) -> bool:
        return self._is_sampled and self._results.ready(self._turn)

    def token_ids(self) -> list[int]:
        assert self._is_sampled, "a step is sampled before it is collected"
        return self._results.wait(self._turn, self._num_rows)


class DecodeForward(Protocol):
    """`phloem.shared.engine.models.decode_pass.DecodePass`."""

    def forward(self, rows: DecodeRows, kv: KVCache) -> Tensor: ...


class DecodeParts(NamedTuple):
    """What captured steps are made of, not the decoder's own forward pass. cos, sin: as `DecodeRows`.
    `cooperative` have graphs of their own, beside the others."""

    forward: DecodeForward
    tables: DecodeTables
    cos: Tensor
    sin: Tensor
    cooperative: CooperativeSteps | None = None


class CudaStepRunner:
    """The model on one CUDA device. `capture` before the first launch makes the decode graphs."""

    def __init__(
        self,
        model: Forward,
        kv: KVCache,
        device: torch.device,
        attention: CudaAttention,
        sizes: RunnerSizes,
        decode: DecodeParts | None = None,
        calls: DeviceCalls | None = None,
    ) -> None:
        """`calls` stands in for CUDA where there is none."""
        self._decode = decode
        self._cooperative = decode.cooperative if decode is not None else None
        self._model = model
        self._kv = kv
        self._device = device
        self._calls = calls or CudaCalls(device)
        tables = decode.tables if decode is not None else None
        self._inputs = StepInputs(attention, device, sizes, self._calls.send, tables)
        self._last_token = torch.zeros(sizes.num_slots + 1, dtype=torch.int64, device=device)
        self._results = StepResults(device, sizes.num_slots + 1, self._calls)
        self._graphs: dict[int, Captured] = {}
        self._cooperative_graphs: dict[int, Captured] = {}
        self._bucket_of: npt.NDArray[np.int64] = _EMPTY

    # -- graphs ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self, buckets: list[int], progress: Callable[[int, int], None]) -> None:
        """Captures the decode step for each batch size; the largest first, for a shared pool."""
        for done, size in enumerate(sorted(buckets, reverse=True)):
            progress(done, len(buckets))
            self._graphs[size] = self._calls.capture(self._padding_step(size))
            if self._cooperative is not None and self._cooperative.takes(size):
                step = self._padding_step(size, cooperative=True)
                self._cooperative_graphs[size] = self._calls.capture(step)
        progress(len(buckets), len(buckets))
        self._bucket_of = _buckets_by_count(sorted(self._graphs))

    def _padding_step(self, size: int, *, cooperative: bool = False) -> Callable[[], Tensor]:
        """What a graph consists of: new pages, the forward pass, sampling. Returns the logits."""
        inputs, plans = self._inputs.padding(size)
        forward = self._forward(inputs, plans, cooperative=cooperative)

        def step() -> Tensor:
            logits = forward()
            self._sample(logits, inputs, all_greedy=False)
            return logits

        return step

    def _forward(
        self, inputs: DecodeInputs, plans: Mapping[int, PlannedRows], *, cooperative: bool
    ) -> Callable[[], Tensor]:
        parts = self._decode
        if parts is None:
            return lambda: self._model.forward(self._batch(inputs.rows, None, plans), self._kv)
        rows = self._decode_rows(parts, inputs)

        def forward() -> Tensor:
            ops.place_pages(rows.page_table, inputs.header, inputs.pairs)
            if cooperative and parts.cooperative is not None:
                return parts.cooperative.forward(rows)
            return parts.forward.forward(rows, self._kv)

        return forward

    def _decode_rows(self, parts: DecodeParts, inputs: DecodeInputs) -> DecodeRows:
        return DecodeRows(
            token=inputs.rows.token,
            slot=inputs.rows.slot,
            position=inputs.rows.position,
            write_index=inputs.rows.write_index,
            last_token=self._last_token,
            page_table=parts.tables.page_table,
            work=inputs.work,
            cos=parts.cos,
            sin=parts.sin,
        )

    # -- launch ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: StepPlan, watch: LayerWatch | None = None) -> CudaStep:
        decode = plan.decode
        turn = self._results.next_turn()
        if decode is not None and len(decode.positions) < len(self._bucket_of):
            step = self._launch_graph(decode, turn, watch)
        else:
            step = self._launch_mixed(plan.rows, turn, watch)
        if not plan.constrained:
            step.sample()
        return step

    def _launch_graph(self, step: DecodeStep, turn: int, watch: LayerWatch | None) -> CudaStep:
        size = int(self._bucket_of[len(step.positions)])
        sampled = self._inputs.decode(step, size, turn)
        captured = self._graphs[size]
        if self._cooperative is not None and self._cooperative.is_due(size):
            captured = self._cooperative_graphs[size]
        captured.replay()
        if watch is not None:
            watch.all_at(self._mark())

        def draw(masks: TokenMasks | None) -> None:
            if masks is not None or not sampled.hints.no_filters:
                self._draw(captured.logits[: sampled.num_rows], sampled, masks)

        return CudaStep(self._results, turn, sampled.num_rows, draw)

    def _launch_mixed(self, rows: list[Row], turn: int, watch: LayerWatch | None) -> CudaStep:
        step = self._inputs.mixed(rows, turn)
        batch = self._batch(step.tokens, step.logits_index, step.plans)
        if watch is not None:
            batch = batch._replace(on_kv=watch.on_kv(self._mark))
        logits = self._model.forward(batch, self._kv)
        sampled = step.sampled

        def draw(masks: TokenMasks | None) -> None:
            if sampled is not None:
                self._draw(logits, sampled, masks)

        return CudaStep(self._results, turn, sampled.num_rows if sampled is not None else 0, draw)

    def _mark(self) -> DeviceEvent:
        return DeviceEvent(self._device)

    def _batch(
        self, inputs: RowInputs, logits_index: Tensor | None, plans: Mapping[int, PlannedRows]
    ) -> ForwardBatch:
        return ForwardBatch(
            input_ids=torch.where(inputs.token < 0, self._last_token[inputs.slot], inputs.token),
            positions=inputs.position,
            write_index=inputs.write_index,
            logits_index=logits_index,
            plans=plans,
        )

    # -- sampling --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _draw(self, logits: Tensor, sampled: SampledRows, masks: TokenMasks | None) -> None:
        """Draws the rows' tokens outside a graph; those that a graph drew without masks and filters go."""
        if masks is not None and len(masks.rows):
            bitmask, rows = (part.to(self._device, non_blocking=True) for part in (masks.bitmask, masks.rows))
            ops.apply_bitmask(logits, bitmask, rows)
        count, turn, inputs, hints = sampled
        if hints.no_filters:
            self._sample(logits, inputs, all_greedy=hints.all_greedy)
            return
        rows_in = inputs.rows
        tokens = ops.sample(
            logits,
            rows_in.temperature[:count],
            rows_in.top_k[:count],
            rows_in.top_p[:count],
            rows_in.min_p[:count],
            rows_in.seed[:count],
            rows_in.sample_position[:count],
            hints=hints,
        )
        self._last_token.index_copy_(0, rows_in.slot[:count], tokens)
        self._results.tokens[turn, :count].copy_(tokens, non_blocking=True)

    def _sample(self, logits: Tensor, inputs: DecodeInputs, *, all_greedy: bool) -> None:
        """Without filters: for as many rows as there are logits."""
        count, rows = len(logits), inputs.rows
        ops.sample_to_slots(
            logits,
            rows.temperature[:count],
            rows.seed[:count],
            rows.sample_position[:count],
            rows.slot[:count],
            self._last_token,
            self._results.tokens,
            inputs.header[1:],
            all_greedy=all_greedy,
        )


def decode_buckets(max_batch: int) -> list[int]:
    """Batch sizes that get a graph: fine where a row is dear, coarse where it is cheap."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 4097, 32)]
    return [size for size in sizes if size < max_batch] + [max_batch]


def _buckets_by_count(sizes: list[int]) -> npt.NDArray[np.int64]:
    """Entry n is the smallest captured size that holds n rows."""
    counts = np.arange(sizes[-1] + 1)
    return np.asarray(sizes, dtype=np.int64)[np.searchsorted(sizes, counts)]

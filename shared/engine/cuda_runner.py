"""Runs step plans on a CUDA device that stays ahead of the host.

A launch only enqueues: inputs come from pinned buffers, unknown input tokens from the slot's last-token
buffer on the device, and the step's tokens go back into pinned memory with an event behind them. Steps of
decode rows alone replay a CUDA graph captured for the next larger batch size; a step with prompt chunks
runs eagerly. Sampling is a launch of its own after the forward pass.

    rows of a step:  [ decode rows, one token each | chunk rows ]      scheduler's order
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.kernels.types import DecodeRows
from phloem.shared.engine.cuda_attention import CudaAttention, PlannedRows
from phloem.shared.engine.cuda_inputs import RING, RowInputs
from phloem.shared.engine.decode_tables import DecodeTables
from phloem.shared.engine.grammar.masks import TokenMasks
from phloem.shared.engine.models.batch import ForwardBatch
from phloem.shared.engine.models.decode_pass import DecodePass
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.step_inputs import RunnerSizes, SampledRows, StepInputs
from phloem.shared.engine.step_plan import DecodeStep, Row, StepPlan
from phloem.shared.engine.step_runner import Forward, LayerWatch
from phloem.shared.transfer.device_event import DeviceEvent

_EMPTY = np.zeros(0, dtype=np.int64)


class _Sampled(NamedTuple):
    """The tokens are in pinned memory once the event has happened."""

    tokens: Tensor
    event: torch.cuda.Event


class CudaStep:
    """A launched step."""

    def __init__(self, draw: Callable[[TokenMasks | None], _Sampled]) -> None:
        self._draw = draw
        self._sampled: _Sampled | None = None

    def sample(self, masks: TokenMasks | None = None) -> None:
        self._sampled = self._draw(masks)

    def ready(self) -> bool:
        sampled = self._sampled
        return sampled is not None and bool(sampled.event.query())  # type: ignore[no-untyped-call]

    def token_ids(self) -> list[int]:
        assert self._sampled is not None, "a step is sampled before it is collected"
        self._sampled.event.synchronize()
        ids: list[int] = self._sampled.tokens.tolist()
        return ids


class _Graph(NamedTuple):
    """A captured decode forward pass for `size` rows; `logits` is where it leaves them."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor


class DecodeParts(NamedTuple):
    """What captured steps are made of, not the decoder's own forward pass. cos, sin: as `DecodeRows`."""

    forward: DecodePass
    tables: DecodeTables  # the same that the runner's `CudaAttention` keeps up to date
    cos: Tensor
    sin: Tensor


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
    ) -> None:
        self._decode = decode
        self._model = model
        self._kv = kv
        self._device = device
        self._inputs = StepInputs(attention, device, sizes)
        self._last_token = torch.zeros(sizes.num_slots + 1, dtype=torch.int64, device=device)
        self._results = [
            torch.zeros(sizes.num_slots + 1, dtype=torch.int64, pin_memory=True) for _ in range(RING)
        ]
        self._turn = 0
        self._graphs: dict[int, _Graph] = {}
        self._bucket_of: npt.NDArray[np.int64] = _EMPTY

    # -- graphs ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def capture(self, buckets: list[int], progress: Callable[[int, int], None]) -> None:
        """Captures the decode forward pass for each batch size; the largest first, for a shared pool."""
        pool = None
        for done, size in enumerate(sorted(buckets, reverse=True)):
            progress(done, len(buckets))
            forward = self._padding_step(size)
            forward()
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                logits = forward()
            pool = graph.pool()
            self._graphs[size] = _Graph(graph, logits)
        progress(len(buckets), len(buckets))
        self._bucket_of = _buckets_by_count(sorted(self._graphs))

    def _padding_step(self, size: int) -> Callable[[], Tensor]:
        inputs, plans = self._inputs.padding(size)
        if self._decode is not None:
            decode, rows = self._decode.forward, self._decode_rows(self._decode, inputs)
            return lambda: decode.forward(rows, self._kv)

        def forward() -> Tensor:
            return self._model.forward(self._batch(inputs, None, plans), self._kv)

        return forward

    def _decode_rows(self, parts: DecodeParts, inputs: RowInputs) -> DecodeRows:
        return DecodeRows(
            token=inputs.token,
            slot=inputs.slot,
            write_index=inputs.write_index,
            last_token=self._last_token,
            page_table=parts.tables.page_table,
            work=parts.tables.work(len(inputs.token)),
            cos=parts.cos,
            sin=parts.sin,
        )

    # -- launch ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: StepPlan, watch: LayerWatch | None = None) -> CudaStep:
        decode = plan.decode
        if decode is not None and len(decode.positions) < len(self._bucket_of):
            step = self._launch_graph(decode, watch)
        else:
            step = self._launch_mixed(plan.rows, watch)
        if not plan.constrained:
            step.sample()
        return step

    def _launch_graph(self, step: DecodeStep, watch: LayerWatch | None) -> CudaStep:
        count = len(step.positions)
        size = int(self._bucket_of[count])
        sampled = self._inputs.decode(step, size)
        captured = self._graphs[size]
        captured.graph.replay()
        if watch is not None:
            watch.all_at(self._mark())
        return CudaStep(partial(self._draw, captured.logits[:count], sampled))

    def _launch_mixed(self, rows: list[Row], watch: LayerWatch | None) -> CudaStep:
        step = self._inputs.mixed(rows)
        batch = self._batch(step.tokens, step.logits_index, step.plans)
        if watch is not None:
            batch = batch._replace(on_kv=watch.on_kv(self._mark))
        logits = self._model.forward(batch, self._kv)
        return CudaStep(partial(self._draw, logits, step.sampled))

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

    # -- results ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _draw(self, logits: Tensor, sampled: SampledRows | None, masks: TokenMasks | None) -> _Sampled:
        """Draws the rows' tokens and notes them, on the device and on the way to the host."""
        if sampled is None:
            return self._result(torch.empty(0, dtype=torch.int64, device=self._device))
        count, inputs, hints = sampled
        if masks is not None and len(masks.rows):
            bitmask, rows = (part.to(self._device, non_blocking=True) for part in (masks.bitmask, masks.rows))
            ops.apply_bitmask(logits, bitmask, rows)
        tokens = ops.sample(
            logits,
            inputs.temperature[:count],
            inputs.top_k[:count],
            inputs.top_p[:count],
            inputs.min_p[:count],
            inputs.seed[:count],
            inputs.sample_position[:count],
            hints=hints,
        )
        self._last_token.index_copy_(0, inputs.slot[:count], tokens)
        return self._result(tokens)

    def _result(self, tokens: Tensor) -> _Sampled:
        self._turn = (self._turn + 1) % RING
        result = self._results[self._turn][: len(tokens)]
        result.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's stubs
        event.record()
        return _Sampled(result, event)


def decode_buckets(max_batch: int) -> list[int]:
    """Batch sizes that get a graph: fine where a row is dear, coarse where it is cheap."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 4097, 32)]
    return [size for size in sizes if size < max_batch] + [max_batch]


def _buckets_by_count(sizes: list[int]) -> npt.NDArray[np.int64]:
    """Entry n is the smallest captured size that holds n rows."""
    counts = np.arange(sizes[-1] + 1)
    return np.asarray(sizes, dtype=np.int64)[np.searchsorted(sizes, counts)]

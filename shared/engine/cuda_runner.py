"""Runs step plans on a CUDA device that stays ahead of the host.

A launch only enqueues: inputs come from pinned buffers, unknown input tokens from the slot's last-token
buffer on the device, and the step's tokens go back into pinned memory with an event behind them. Steps of
decode rows alone replay a CUDA graph captured for the next larger batch size; a step with prompt chunks
runs eagerly. Sampling is a launch of its own after the forward pass.

    rows of a step:  [ decode rows, one token each | chunk rows ]      scheduler's order
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.shared.engine.cuda_attention import CudaAttention, PlannedRows
from phloem.shared.engine.cuda_inputs import RING, HostRows, InputRing, RowInputs
from phloem.shared.engine.models.batch import ForwardBatch
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.step_plan import Row, StepPlan
from phloem.shared.engine.step_runner import Forward, SlotTable

_EMPTY = np.zeros(0, dtype=np.int64)


class CudaStep:
    """A launched step; its tokens are in pinned memory once the event has happened."""

    def __init__(self, tokens: Tensor, event: torch.cuda.Event) -> None:
        self._tokens = tokens
        self._event = event

    def ready(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]  # torch's stubs

    def token_ids(self) -> list[int]:
        self._event.synchronize()
        ids: list[int] = self._tokens.tolist()
        return ids


class _Graph(NamedTuple):
    """A captured decode forward pass for `size` rows; `logits` is where it leaves them."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor


class RunnerSizes(NamedTuple):
    num_slots: int
    max_pages: int  # of one request
    max_step_tokens: int
    scratch_page: int  # a page of the KV tensors that belongs to nobody: padding rows write there


class CudaStepRunner:
    """The model on one CUDA device. `capture` before the first launch makes the decode graphs."""

    def __init__(
        self,
        model: Forward,
        kv: KVCache,
        device: torch.device,
        attention: CudaAttention,
        sizes: RunnerSizes,
    ) -> None:
        self._model = model
        self._kv = kv
        self._device = device
        self._attention = attention
        self._sizes = sizes
        self._page_size = kv.page_size
        self._slots = SlotTable(sizes.num_slots + 1, sizes.max_pages)
        self._scratch_slot = sizes.num_slots
        self._slots.page_ids[self._scratch_slot] = sizes.scratch_page
        self._slots.temperature[self._scratch_slot] = 0.0
        self._last_token = torch.zeros(sizes.num_slots + 1, dtype=torch.int64, device=device)
        self._rows = InputRing(sizes.num_slots + 1, device)
        self._tokens = InputRing(sizes.max_step_tokens + sizes.num_slots, device)
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
        """A forward pass over `size` padding rows, which has something harmless to do."""
        slots = np.full(size, self._scratch_slot, dtype=np.int64)
        self._fill(self._rows.host(size), slots, np.zeros(size, dtype=np.int64), [0] * size)
        inputs = self._rows.upload(size)
        plans = self._attention.plan_decode(
            self._slots.page_ids, slots, np.ones(size, dtype=np.int64), in_graph=True
        )

        def forward() -> Tensor:
            return self._model.forward(self._batch(inputs, None, plans), self._kv)

        return forward

    # -- launch ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> CudaStep:
        for row in plan.rows:
            self._slots.bind(row.request)
        num_decode = _num_leading_decodes(plan.rows)
        if num_decode == len(plan.rows) and num_decode < len(self._bucket_of):
            return self._launch_graph(plan.rows)
        return self._launch_mixed(plan.rows, num_decode)

    def _launch_graph(self, rows: list[Row]) -> CudaStep:
        count = len(rows)
        size = int(self._bucket_of[count])
        slots = np.full(size, self._scratch_slot, dtype=np.int64)
        slots[:count] = [row.request.slot for row in rows]
        positions = np.zeros(size, dtype=np.int64)
        positions[:count] = [row.start for row in rows]
        tokens = [-1 if row.from_device else row.request.token_ids[row.start] for row in rows]
        self._fill(self._rows.host(size), slots, positions, tokens + [0] * (size - count))
        inputs = self._rows.upload(size)
        self._attention.plan_decode(self._slots.page_ids, slots, positions + 1, in_graph=True)
        captured = self._graphs[size]
        captured.graph.replay()
        return self._finish(captured.logits[:count], inputs, slots[:count], count)

    def _launch_mixed(self, rows: list[Row], num_decode: int) -> CudaStep:
        slots = np.fromiter((row.request.slot for row in rows), np.int64, len(rows))
        starts = np.fromiter((row.start for row in rows), np.int64, len(rows))
        counts = np.fromiter((row.num_tokens for row in rows), np.int64, len(rows))
        batch = self._mixed_batch(rows, slots, starts, counts, num_decode)
        samples = np.fromiter((row.samples for row in rows), bool, len(rows))
        logits = self._model.forward(batch, self._kv)
        num_samples = int(samples.sum())
        if not num_samples:
            return self._result(torch.empty(0, dtype=torch.int64, device=self._device), 0)
        sampled = slots[samples]
        self._fill(self._rows.host(num_samples), sampled, (starts + counts - 1)[samples], [0] * num_samples)
        return self._finish(logits, self._rows.upload(num_samples), sampled, num_samples)

    def _mixed_batch(
        self,
        rows: list[Row],
        slots: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        num_decode: int,
    ) -> ForwardBatch:
        ends = np.cumsum(counts)
        total = int(ends[-1])
        host = self._tokens.host(total)
        host.slot[:] = np.repeat(slots, counts)
        host.position[:] = np.repeat(starts - (ends - counts), counts) + np.arange(total)
        host.write_index[:] = self._write_index(host.slot, host.position)
        host.token[:] = _input_tokens(rows)
        samples = np.fromiter((row.samples for row in rows), bool, len(rows))
        last = (ends - 1)[samples]
        host.seed[: len(last)] = last
        inputs = self._tokens.upload(total)
        plans = self._attention.plan_mixed(self._slots.page_ids, slots, counts, starts + counts, num_decode)
        return self._batch(inputs, inputs.seed[: len(last)], plans)

    # -- inputs ----------------------------------------------------------------------------------------

    def _fill(
        self,
        host: HostRows,
        slots: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        tokens: list[int],
    ) -> None:
        """One entry per row: `positions` of the row's last input token; the next one is sampled."""
        table = self._slots
        host.slot[:] = slots
        host.token[:] = tokens
        host.position[:] = positions
        host.write_index[:] = self._write_index(slots, positions)
        host.seed[:] = table.seed[slots]
        host.sample_position[:] = positions + 1
        host.top_k[:] = table.top_k[slots]
        host.temperature[:] = table.temperature[slots]
        host.top_p[:] = table.top_p[slots]
        host.min_p[:] = table.min_p[slots]

    def _write_index(
        self, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        pages = self._slots.page_ids[slots, positions // self._page_size]
        return pages * self._page_size + positions % self._page_size

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

    def _finish(
        self, logits: Tensor, inputs: RowInputs, slots: npt.NDArray[np.int64], count: int
    ) -> CudaStep:
        """Samples `count` rows and notes their tokens, on the device and on the way to the host."""
        table = self._slots
        tokens = ops.sample(
            logits,
            inputs.temperature[:count],
            inputs.top_k[:count],
            inputs.top_p[:count],
            inputs.min_p[:count],
            inputs.seed[:count],
            inputs.sample_position[:count],
            hints=ops.SamplingHints(
                all_greedy=not bool(table.temperature[slots].any()),
                no_filters=bool(
                    (table.top_k[slots] <= 0).all()
                    and (table.top_p[slots] >= 1.0).all()
                    and (table.min_p[slots] <= 0.0).all()
                ),
            ),
        )
        self._last_token.index_copy_(0, inputs.slot[:count], tokens)
        return self._result(tokens, count)

    def _result(self, tokens: Tensor, count: int) -> CudaStep:
        self._turn = (self._turn + 1) % RING
        result = self._results[self._turn][:count]
        result.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's stubs
        event.record()
        return CudaStep(result, event)


def decode_buckets(max_batch: int) -> list[int]:
    """Batch sizes that get a graph: fine where a row is dear, coarse where it is cheap."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 4097, 32)]
    return [size for size in sizes if size < max_batch] + [max_batch]


def _buckets_by_count(sizes: list[int]) -> npt.NDArray[np.int64]:
    """Entry n is the smallest captured size that holds n rows."""
    counts = np.arange(sizes[-1] + 1)
    return np.asarray(sizes, dtype=np.int64)[np.searchsorted(sizes, counts)]


def _num_leading_decodes(rows: list[Row]) -> int:
    for index, row in enumerate(rows):
        if row.num_tokens != 1 or not row.samples:
            return index
    return len(rows)


def _input_tokens(rows: list[Row]) -> list[int]:
    tokens: list[int] = []
    for row in rows:
        if row.from_device:
            tokens.append(-1)
        else:
            tokens += row.request.token_ids[row.start : row.start + row.num_tokens]
    return tokens

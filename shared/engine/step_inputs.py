"""Fills a step's inputs on the host and sends them off: what a runner does before the device is asked.

Works on arrays by slot; for a step of the same `DecodeBatch` as the one before, only positions, tokens and
the pages of grown rows are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.kernels.flashinfer_ops.page_lists import PagedRows
from phloem.shared.engine.cuda_attention import CudaAttention, PlannedRows
from phloem.shared.engine.cuda_inputs import RING, HostRows, InputRing, RowInputs, Send
from phloem.shared.engine.decode_tables import DecodeTables
from phloem.shared.engine.decode_upload import DecodeInputs, DecodeUpload
from phloem.shared.engine.slot_table import SlotTable
from phloem.shared.engine.step_plan import FROM_DEVICE, DecodeBatch, DecodeStep, Row

Int64Array: TypeAlias = npt.NDArray[np.int64]


class RunnerSizes(NamedTuple):
    num_slots: int
    max_pages: int  # of one request
    max_step_tokens: int
    page_size: int
    scratch_page: int  # a page of the KV tensors that belongs to nobody: padding rows write there


class SampledRows(NamedTuple):
    """`num_rows` rows to sample; `inputs` may hold padding rows behind them. `turn`: see `StepResults`."""

    num_rows: int
    turn: int
    inputs: DecodeInputs
    hints: ops.SamplingHints


class MixedInputs(NamedTuple):
    """A step with chunks: one entry of `tokens` per token; `logits_index` are the last ones of the rows that
    sample."""

    tokens: RowInputs
    logits_index: Tensor
    plans: Mapping[int, PlannedRows]
    sampled: SampledRows | None


class _Prepared(NamedTuple):
    """What stays the same over the steps of a batch; arrays `[size]`, padding rows included."""

    batch: DecodeBatch
    slots: Int64Array
    positions: Int64Array
    ones: Int64Array
    rows: HostRows
    hints: ops.SamplingHints


class StepInputs:
    """Owns the slot table and the input buffers. No model, no kernels: it runs on a CPU as well."""

    def __init__(
        self,
        attention: CudaAttention,
        device: torch.device,
        sizes: RunnerSizes,
        send: Send,
        tables: DecodeTables | None = None,
    ) -> None:
        """With `tables`, steps of decode rows alone are the decode kernels'; `attention` plans the others."""
        self._attention = attention
        self._tables = tables
        self._page_size = sizes.page_size
        self._slots = SlotTable(sizes.num_slots + 1, sizes.max_pages)
        self._scratch_slot = sizes.num_slots
        self._slots.page_ids[self._scratch_slot] = sizes.scratch_page
        self._slots.temperature[self._scratch_slot] = 0.0
        self._rows = DecodeUpload(device, sizes.num_slots + 1, tables, send)
        self._tokens = InputRing(sizes.max_step_tokens + sizes.num_slots, device, send)
        self._prepared: _Prepared | None = None  # of the step before
        self._filled: list[_Prepared | None] = [None] * RING  # whose constants each buffer holds

    def padding(self, size: int) -> tuple[DecodeInputs, Mapping[int, PlannedRows]]:
        """A decode step of `size` padding rows, which has something harmless to do, for a graph's capture."""
        step = DecodeStep(DecodeBatch([]), np.zeros(0, dtype=np.int64), None, [])
        self._prepared = self._prepare(step.batch, size)
        return self._send(self._prepared, step, 0, same_rows=False)

    def decode(self, step: DecodeStep, size: int, turn: int) -> SampledRows:
        """A decode step, padded to the `size` of the graph that will be replayed."""
        before, batch = self._prepared, step.batch
        same = before is not None and before.batch is batch and len(before.slots) == size
        if same:
            assert before is not None
            prepared = before
            for row in step.grown:
                self._slots.bind(batch.requests[row])
        else:
            for request in batch.requests:
                self._slots.bind(request)
            prepared = self._prepared = self._prepare(batch, size)
        prepared.positions[: len(batch.slots)] = step.positions
        inputs, _ = self._send(prepared, step, turn, same_rows=same)
        return SampledRows(len(batch.slots), turn, inputs, prepared.hints)

    def mixed(self, rows: list[Row], turn: int) -> MixedInputs:
        """Decode rows and chunks, as the model computes them without a graph."""
        self._prepared = None  # the next one fills all of its buffer: this step writes there, too
        for row in rows:
            self._slots.bind(row.request)
        slots = np.fromiter((row.request.slot for row in rows), np.int64, len(rows))
        starts = np.fromiter((row.start for row in rows), np.int64, len(rows))
        counts = np.fromiter((row.num_tokens for row in rows), np.int64, len(rows))
        samples = np.fromiter((row.samples for row in rows), bool, len(rows))
        ends = np.cumsum(counts)
        total = int(ends[-1])
        host = self._tokens.host(total)
        host.slot[:] = np.repeat(slots, counts)
        host.position[:] = np.repeat(starts - (ends - counts), counts) + np.arange(total)
        host.write_index[:] = self._slots.write_index(host.slot, host.position, self._page_size)
        host.token[:] = _input_tokens(rows)
        last = (ends - 1)[samples]
        host.seed[: len(last)] = last
        tokens = self._tokens.upload(total)
        plans = self._attention.plan_mixed(
            PagedRows(self._slots.page_ids, slots, counts, starts + counts), _num_leading_decodes(rows)
        )
        sampled = self._sampled(slots[samples], (starts + counts)[samples], turn) if len(last) else None
        return MixedInputs(tokens, tokens.seed[: len(last)], plans, sampled)

    # -- inside ----------------------------------------------------------------------------------------

    def _prepare(self, batch: DecodeBatch, size: int) -> _Prepared:
        slots = np.full(size, self._scratch_slot, dtype=np.int64)
        slots[: len(batch.slots)] = batch.slots
        zeros = np.zeros(size, dtype=np.int64)
        table = self._slots
        rows = HostRows(
            slots,
            zeros,
            zeros,
            zeros,
            table.seed[slots],
            zeros,
            table.top_k[slots],
            table.temperature[slots],
            table.top_p[slots],
            table.min_p[slots],
        )
        ones = np.ones(size, dtype=np.int64)
        return _Prepared(batch, slots, zeros.copy(), ones, rows, self._hints(batch.slots))

    def _send(
        self, prepared: _Prepared, step: DecodeStep, turn: int, *, same_rows: bool
    ) -> tuple[DecodeInputs, Mapping[int, PlannedRows]]:
        """Everything that the step needs, in one copy; FlashInfer's and Triton's plans go by themselves."""
        size, positions = len(prepared.slots), prepared.positions
        paged = PagedRows(self._slots.page_ids, prepared.slots, prepared.ones, positions + 1, same_rows)
        host = self._rows.host(size)
        if self._filled[self._rows.turn] is not prepared:
            _fill_constants(host.rows, prepared.rows)
            self._filled[self._rows.turn] = prepared
        self._fill_rows(host.rows, prepared, step)
        num_pairs = 0
        plans: Mapping[int, PlannedRows] = {}
        if self._tables is not None:
            num_pairs = self._tables.write(paged, host.work, host.pairs)
        else:
            plans = self._attention.plan_decode(paged, in_graph=True)
        host.header[:2] = num_pairs, turn
        return self._rows.send(size, num_pairs), plans

    def _fill_rows(self, host: HostRows, prepared: _Prepared, step: DecodeStep) -> None:
        count, positions = len(step.positions), prepared.positions
        host.token[:count] = FROM_DEVICE if step.tokens is None else step.tokens
        host.token[count:] = 0
        host.position[:] = positions
        host.write_index[:] = self._slots.write_index(prepared.slots, positions, self._page_size)
        host.sample_position[:] = positions + 1

    def _sampled(self, slots: Int64Array, positions: Int64Array, turn: int) -> SampledRows:
        """Rows whose next tokens, at `positions`, are drawn outside a graph: only sampling reads them."""
        table, count = self._slots, len(slots)
        upload = self._rows.host(count)
        upload.header[:2] = 0, turn
        host = upload.rows
        host.slot[:] = slots
        host.seed[:] = table.seed[slots]
        host.sample_position[:] = positions
        host.top_k[:] = table.top_k[slots]
        host.temperature[:] = table.temperature[slots]
        host.top_p[:] = table.top_p[slots]
        host.min_p[:] = table.min_p[slots]
        return SampledRows(count, turn, self._rows.send(count, 0), self._hints(slots))

    def _hints(self, slots: Int64Array) -> ops.SamplingHints:
        table = self._slots
        drawn = slots[table.temperature[slots] > 0.0]  # the best token passes every filter
        no_top_k = bool((table.top_k[drawn] <= 0).all())
        no_top_p = bool((table.top_p[drawn] >= 1.0).all())
        return ops.SamplingHints(
            all_greedy=not len(drawn),
            no_filters=no_top_k and no_top_p and bool((table.min_p[drawn] <= 0.0).all()),
            no_top_k=no_top_k,
            no_top_p=no_top_p,
        )


def _fill_constants(host: HostRows, fixed: HostRows) -> None:
    """What is the same in every step of a batch."""
    host.slot[:] = fixed.slot
    host.seed[:] = fixed.seed
    host.top_k[:] = fixed.top_k
    host.temperature[:] = fixed.temperature
    host.top_p[:] = fixed.top_p
    host.min_p[:] = fixed.min_p


def _num_leading_decodes(rows: list[Row]) -> int:
    for index, row in enumerate(rows):
        if row.num_tokens != 1 or not row.samples:
            return index
    return len(rows)


def _input_tokens(rows: list[Row]) -> list[int]:
    tokens: list[int] = []
    for row in rows:
        if row.from_device:
            tokens.append(FROM_DEVICE)
        else:
            tokens += row.request.token_ids[row.start : row.start + row.num_tokens]
    return tokens

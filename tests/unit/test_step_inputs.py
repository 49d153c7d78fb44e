"""The inputs that a step finds on the device are those of its rows, whichever way the step was planned."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.kernels.flashinfer_ops.page_lists import PageLists
from phloem.shared.engine.cuda_attention import CudaAttention
from phloem.shared.engine.cuda_inputs import RING, RowInputs
from phloem.shared.engine.decode_tables import DecodeTables
from phloem.shared.engine.offline.null_device import NullLane
from phloem.shared.engine.step_inputs import RunnerSizes, SampledRows, StepInputs
from phloem.shared.engine.step_plan import FROM_DEVICE, Row, StepPlan
from tests.support.engine_world import EngineWorld, FakeStep, next_tokens

CPU = torch.device("cpu")
PAGE = 4
SLOTS = 6
SCRATCH = 500
KV_HEADS = 2
SIZES = RunnerSizes(SLOTS, 64, 64, PAGE, SCRATCH)


def copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


class CheckedInputs:
    """Plans the inputs of every step of an `EngineWorld`, and compares them with the plan's rows."""

    def __init__(self, world: EngineWorld, padding: int = 0, *, kernels: bool = False) -> None:
        """`kernels`: steps of decode rows alone are made of the decode kernels, which read tables."""
        self.decode_lane, self.chunk_lane = NullLane(SIZES), NullLane(SIZES)
        self.tables = make_tables() if kernels else None
        attention = CudaAttention({0: (self.decode_lane, self.chunk_lane)})
        self.inputs = StepInputs(attention, CPU, SIZES, copy, self.tables)
        self.turn = 0
        self.num_continued = 0
        self.num_grown = 0
        self._padding = padding
        self._launch = world.device.launch
        self._last_batch: object = None

    def launch(self, plan: StepPlan, watch: object = None) -> FakeStep:
        self.turn = (self.turn + 1) % RING
        if plan.decode is None:
            self._check_mixed(plan.rows)
            self._last_batch = None
        else:
            self.num_continued += plan.decode.batch is self._last_batch
            self.num_grown += len(plan.decode.grown)
            self._last_batch = plan.decode.batch
            size = min(SLOTS, plan.num_rows + self._padding)
            self._check_decode(plan.rows, self.inputs.decode(plan.decode, size, self.turn), size)
        return self._launch(plan)

    def _check_decode(self, rows: list[Row], sampled: SampledRows, size: int) -> None:
        count, turn, (inputs, header, work, pairs), hints = sampled
        assert count == len(rows) and len(inputs.slot) == size
        assert turn == header[1] == self.turn
        assert inputs.slot.tolist() == [row.request.slot for row in rows] + [SLOTS] * (size - count)
        known = [FROM_DEVICE if row.from_device else row.request.token_ids[row.start] for row in rows]
        assert inputs.token.tolist() == known + [0] * (size - count)
        self._check_places([(row, row.start) for row in rows], inputs)
        assert inputs.write_index[count:].tolist() == [SCRATCH * PAGE] * (size - count)
        self._check_sampling(rows, sampled)
        assert hints.all_greedy == all(row.request.sampling.temperature == 0 for row in rows)
        if self.tables is not None:
            ops.place_pages(self.tables.page_table, header, pairs)
            self._check_tables(self.tables, work, rows, size)
        else:
            self._check_lists(self.decode_lane.lists, rows, size - count)

    def _check_mixed(self, rows: list[Row]) -> None:
        tokens, logits_index, _, sampled = self.inputs.mixed(rows, self.turn)
        places = [(row, row.start + offset) for row in rows for offset in range(row.num_tokens)]
        known = [FROM_DEVICE if row.from_device else row.request.token_ids[at] for row, at in places]
        assert tokens.token.tolist() == known
        self._check_places(places, tokens)
        wanted = [row for row in rows if row.samples]
        ends = [index for index, (row, at) in enumerate(places) if row.samples and at == _last(row)]
        assert logits_index.tolist() == ends
        assert (sampled is None) == (not wanted)
        if sampled is not None:
            self._check_sampling(wanted, sampled)
        num_decode = next(
            (i for i, row in enumerate(rows) if row.num_tokens > 1 or not row.samples), len(rows)
        )
        if num_decode:
            self._check_lists(self.decode_lane.lists, rows[:num_decode], 0)
        if num_decode < len(rows):
            self._check_lists(self.chunk_lane.lists, rows[num_decode:], 0)

    def _check_places(self, places: list[tuple[Row, int]], inputs: RowInputs) -> None:
        count = len(places)
        assert inputs.position[:count].tolist() == [at for _, at in places]
        index = [row.request.page_ids[at // PAGE] * PAGE + at % PAGE for row, at in places]
        assert inputs.write_index[:count].tolist() == index

    def _check_sampling(self, rows: list[Row], sampled: SampledRows) -> None:
        count, turn, (inputs, header, _, _), _ = sampled
        assert count == len(rows) and turn == header[1] == self.turn
        assert inputs.slot[:count].tolist() == [row.request.slot for row in rows]
        assert inputs.seed[:count].tolist() == [row.request.sampling.seed for row in rows]
        assert inputs.sample_position[:count].tolist() == [_last(row) + 1 for row in rows]
        heat = [row.request.sampling.temperature for row in rows]
        assert inputs.temperature[:count].tolist() == heat

    def _check_tables(self, tables: DecodeTables, work: Tensor, rows: list[Row], size: int) -> None:
        """The rows' pages are in the table of their slots; their items are all keys of each row, once
        (rows long enough to be cut: `test_key_shares.py`)."""
        for row in rows:
            pages = row.request.page_ids[: row.start // PAGE + 1]
            assert tables.page_table[row.request.slot, : len(pages)].tolist() == pages
        assert tables.page_table[SLOTS, 0] == SCRATCH or size == len(rows)
        wanted = [(row.request.slot, row.start) for row in rows] + [(SLOTS, 0)] * (size - len(rows))
        keys: list[list[int]] = [[] for _ in wanted]
        items = [item for item in work.tolist() if item[0] >= 0]
        for place, (index, slot, position, begin, end, first, count, _) in enumerate(items):
            assert (slot, position) == wanted[index]
            assert first <= place < first + count and [item[0] for item in items].count(index) == count
            keys[index] += range(begin, end)
        assert keys == [list(range(position)) for _, position in wanted]

    def _check_lists(self, lists: PageLists, rows: list[Row], padding: int) -> None:
        pages = [row.request.page_ids[: _last(row) // PAGE + 1] for row in rows] + [[SCRATCH]] * padding
        flat = [page for row in pages for page in row]
        assert lists.device_indices[: len(flat)].tolist() == flat
        assert lists.device_kv_indptr.diff().tolist() == [len(row) for row in pages]
        last = [_last(row) % PAGE + 1 for row in rows] + [1] * padding
        assert lists.device_last_page_len.tolist() == last


def make_tables() -> DecodeTables:
    return DecodeTables(
        CPU, num_slots=SLOTS + 1, max_pages=SIZES.max_pages, page_size=PAGE, num_kv_heads=KV_HEADS
    )


def _last(row: Row) -> int:
    return row.start + row.num_tokens - 1


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize(("overlap", "num_pages"), [(True, 200), (False, 200), (True, 44)])
def test_inputs_are_those_of_the_rows(
    monkeypatch: pytest.MonkeyPatch, overlap: bool, num_pages: int, padding: int, kernels: bool
) -> None:
    """Requests come and go, some end early, and with 44 pages some are retracted."""
    rng = random.Random(5)
    world = EngineWorld(num_pages=num_pages, page_size=PAGE, slots=SLOTS, budget=64, overlap=overlap)
    checked = CheckedInputs(world, padding, kernels=kernels)
    monkeypatch.setattr(world.device, "launch", checked.launch)
    want = {}
    for index in range(14):
        prompt = [rng.randint(1, 90) for _ in range(rng.randint(1, 30))]
        expected = next_tokens(prompt, rng.randint(1, 120))
        stop = rng.choice([*expected, 500])
        want[f"r{index}"] = expected[: expected.index(stop) + 1] if stop in expected else expected
        world.submit(f"r{index}", prompt, len(expected), stop=(stop,))
        for _ in range(rng.randint(0, 8)):
            world.turn()
    world.assert_idle()
    assert {request_id: world.streams[request_id].token_ids for request_id in want} == want
    assert checked.num_continued > 30 and checked.num_grown > 5
    assert (world.audit().counters["retractions"] > 0) == (num_pages == 44)


def test_padding_rows_write_where_nobody_reads() -> None:
    lane = NullLane(SIZES)
    (inputs, header, _, _), _ = StepInputs(CudaAttention({0: (lane, lane)}), CPU, SIZES, copy).padding(3)
    assert header[0] == 0
    assert inputs.slot.tolist() == [SLOTS] * 3
    assert inputs.write_index.tolist() == [SCRATCH * PAGE] * 3
    assert inputs.position.tolist() == inputs.token.tolist() == [0] * 3
    assert lane.lists.device_indices[:3].tolist() == [SCRATCH] * 3

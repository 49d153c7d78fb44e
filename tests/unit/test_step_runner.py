"""The step runner: which tensors the model sees for a plan, and how tokens are drawn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phloem.shared.engine.models.batch import ForwardBatch
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.requests import Request
from phloem.shared.engine.step_plan import Row, StepPlan
from phloem.shared.engine.step_runner import SyncStepRunner
from phloem.shared.engine.warmup import warm_up, warm_up_filters
from phloem.shared.protocol.session import SamplingParams, Submit
from tests.support.tiny_model import random_prompt, tiny_decoder

CPU = torch.device("cpu")
PAGE = 4
NUM_PAGES = 32


class RecordingModel:
    """Logits that favour, for each wanted row, the token after the input one."""

    def __init__(self) -> None:
        self.batches: list[ForwardBatch] = []

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        self.batches.append(batch)
        inputs = batch.input_ids[wanted_rows(batch)]
        return torch.nn.functional.one_hot((inputs + 1) % 100, 100).float() * 3.0


def page_table(batch: ForwardBatch) -> list[list[int]]:
    assert batch.page_table is not None
    rows: list[list[int]] = batch.page_table.tolist()
    return rows


def wanted_rows(batch: ForwardBatch) -> list[int]:
    assert batch.logits_index is not None and batch.logits_index.dtype == torch.int64
    rows: list[int] = batch.logits_index.tolist()
    return rows


def make_runner(model: RecordingModel, num_slots: int = 4) -> SyncStepRunner:
    kv = KVCache([torch.zeros(NUM_PAGES, PAGE, 1, 2)], [torch.zeros(NUM_PAGES, PAGE, 1, 2)])
    return SyncStepRunner(model, kv, CPU, num_slots=num_slots, max_pages=8)


def make_request(
    tokens: list[int], page_ids: list[int], slot: int, sampling: SamplingParams | None = None
) -> Request:
    submit = Submit(
        request_id=f"slot {slot}",
        attempt=1,
        epoch=1,
        phase="both",
        token_ids=tokens,
        num_prompt_tokens=len(tokens),
        sampling=sampling or SamplingParams(max_tokens=9, temperature=0.0),
    )
    request = Request(submit, gateway=0, order=0, eos_token_ids=(), context_length=99, now_s=0.0)
    request.page_ids = page_ids
    request.slot = slot
    return request


def test_batch_of_a_mixed_step() -> None:
    """A decode row, a chunk in the middle of a prompt, and a chunk that ends one."""
    model = RecordingModel()
    runner = make_runner(model)
    decoding = make_request([10, 11, 12, 13, 14, 15], [7, 3], slot=2)
    middle = make_request(list(range(20, 32)), [5, 6, 9], slot=0)
    ending = make_request([40, 41, 42], [1], slot=3)
    plan = StepPlan(
        [
            Row(decoding, 5, 1, True, False),
            Row(middle, 3, 6, False, False),
            Row(ending, 0, 3, True, False),
        ]
    )
    step = runner.launch(plan)
    assert step.ready()
    assert step.token_ids() == [16, 43]
    (batch,) = model.batches
    assert batch.input_ids.tolist() == [15, 23, 24, 25, 26, 27, 28, 40, 41, 42]
    assert batch.positions.tolist() == [5, 3, 4, 5, 6, 7, 8, 0, 1, 2]
    where = [(3, 1), (5, 3), (6, 0), (6, 1), (6, 2), (6, 3), (9, 0), (1, 0), (1, 1), (1, 2)]
    assert batch.write_index.tolist() == [page * PAGE + offset for page, offset in where]
    assert batch.query_lens == [1, 6, 3]
    assert batch.kv_lens == [6, 9, 3]
    assert [row[:n] for row, n in zip(page_table(batch), (2, 3, 1), strict=True)] == [
        [7, 3],
        [5, 6, 9],
        [1],
    ]
    assert {len(row) for row in page_table(batch)} == {3}
    assert wanted_rows(batch) == [0, 9]
    integers = (batch.input_ids, batch.positions, batch.write_index)
    assert {tensor.dtype for tensor in integers} == {torch.int64}


def test_step_that_samples_nothing_has_no_tokens() -> None:
    model = RecordingModel()
    request = make_request(list(range(8)), [0, 1], slot=0)
    step = make_runner(model).launch(StepPlan([Row(request, 0, 5, False, False)]))
    assert step.token_ids() == []
    assert wanted_rows(model.batches[0]) == []


def test_token_that_the_host_does_not_know_comes_from_the_slot() -> None:
    model = RecordingModel()
    runner = make_runner(model)
    first, second = make_request([10, 11], [0], slot=1), make_request([50], [2], slot=0)
    known = make_request([70, 71, 72], [4], slot=2)
    runner.launch(StepPlan([Row(first, 0, 2, True, False), Row(second, 0, 1, True, False)]))
    step = runner.launch(
        StepPlan([Row(known, 0, 3, True, False), Row(second, 1, 1, True, True), Row(first, 2, 1, True, True)])
    )
    assert model.batches[1].input_ids.tolist() == [70, 71, 72, 51, 12]
    assert step.token_ids() == [73, 52, 13]
    # The slot keeps the newest.
    runner.launch(StepPlan([Row(first, 3, 1, True, True)]))
    assert model.batches[2].input_ids.tolist() == [13]


def test_page_that_a_request_got_later_is_in_the_next_batch() -> None:
    model = RecordingModel()
    runner = make_runner(model)
    request = make_request([1, 2, 3, 4], [9], slot=0)
    runner.launch(StepPlan([Row(request, 0, 4, True, False)]))
    request.page_ids.append(4)
    runner.launch(StepPlan([Row(request, 4, 1, True, True)]))
    assert page_table(model.batches[1]) == [[9, 4]]
    assert model.batches[1].write_index.tolist() == [4 * PAGE]


def test_slot_that_another_request_had_is_set_up_anew() -> None:
    model = RecordingModel()
    runner = make_runner(model)
    before = make_request([1] * 10, [9, 8, 7], slot=0, sampling=SamplingParams(max_tokens=5, seed=3))
    runner.launch(StepPlan([Row(before, 0, 10, True, False)]))
    after = make_request([5, 6], [2], slot=0)  # greedy
    steps = [runner.launch(StepPlan([Row(after, 0, 2, True, False)])) for _ in range(5)]
    assert [step.token_ids() for step in steps] == [[7]] * 5
    assert page_table(model.batches[1]) == [[2]]


def test_request_that_moved_to_another_slot_takes_everything_along() -> None:
    """As after a retraction: other pages, another slot, the same parameters."""
    model = RecordingModel()
    runner = make_runner(model)
    sampling = SamplingParams(max_tokens=5, temperature=2.0, seed=12)
    request = make_request([1, 2, 3], [9], slot=0, sampling=sampling)
    first = runner.launch(StepPlan([Row(request, 0, 3, True, False)])).token_ids()
    request.slot, request.page_ids, request.num_bound_pages = 3, [4], -1
    again = runner.launch(StepPlan([Row(request, 0, 3, True, False)])).token_ids()
    assert again == first
    assert page_table(model.batches[1]) == [[4]]


@pytest.mark.parametrize("chunks", [[12], [5, 7], [1] * 12, [11, 1]])
def test_noise_depends_on_the_seed_and_the_absolute_position_only(chunks: list[int]) -> None:
    """Several hot requests with one seed and one prompt draw the same token, wherever their chunks end."""
    decoder = tiny_decoder()
    prompt = random_prompt(12, 1)
    sampling = SamplingParams(max_tokens=5, temperature=1.5, seed=-77)
    tokens = set()
    for others in (0, 3):
        kv = KVCache.allocate(decoder.config, NUM_PAGES, PAGE, torch.float32, CPU)
        runner = SyncStepRunner(decoder, kv, CPU, num_slots=4, max_pages=8)
        request = make_request(prompt, [9, 4, 11], slot=3, sampling=sampling)
        company = [
            make_request(random_prompt(2, n), [20 + n], slot=n, sampling=sampling) for n in range(others)
        ]
        start = 0
        for index, count in enumerate(chunks):
            last = index == len(chunks) - 1
            rows = [Row(other, 0, 2, True, False) for other in company] + [
                Row(request, start, count, last, False)
            ]
            made = runner.launch(StepPlan(rows)).token_ids()
            start += count
        tokens.add(made[-1])
    whole = KVCache.allocate(decoder.config, NUM_PAGES, PAGE, torch.float32, CPU)
    request = make_request(prompt, [0, 1, 2], slot=0, sampling=sampling)
    runner = SyncStepRunner(decoder, whole, CPU, num_slots=1, max_pages=8)
    tokens.update(runner.launch(StepPlan([Row(request, 0, 12, True, False)])).token_ids())
    assert len(tokens) == 1


def test_parameters_of_each_row_are_its_own() -> None:
    """top_k = 1 and a tiny top_p are greedy; a hot row with another seed in the same step is not."""
    model = RecordingModel()
    runner = make_runner(model)
    rows = [
        make_request([10], [0], slot=0, sampling=SamplingParams(max_tokens=5, top_k=1, seed=1)),
        make_request([20], [1], slot=1, sampling=SamplingParams(max_tokens=5, top_p=1e-6, seed=2)),
        make_request([30], [2], slot=2, sampling=SamplingParams(max_tokens=5, min_p=0.9, seed=3)),
        make_request([40], [3], slot=3, sampling=SamplingParams(max_tokens=5, temperature=50.0, seed=4)),
    ]
    hot = set()
    for position in range(6):
        made = runner.launch(
            StepPlan([Row(row, position, 1, True, position > 0) for row in rows])
        ).token_ids()
        assert made[:3] == [11 + position, 21 + position, 31 + position]
        hot.add(made[3])
    assert len(hot) > 3


def test_warm_up_runs_chunk_and_decode_rows_and_leaves_the_runner_usable() -> None:
    model = RecordingModel()
    runner = make_runner(model)
    warm_up(runner, 10, PAGE)
    assert [batch.query_lens for batch in model.batches] == [[10], [1]] * 2
    request = make_request([5, 6], [30], slot=0)
    assert runner.launch(StepPlan([Row(request, 0, 2, True, False)])).token_ids() == [7]
    assert page_table(model.batches[-1]) == [[30]]


def test_warm_up_of_filters_takes_a_slot_and_a_page_for_each_row() -> None:
    model = RecordingModel()
    runner = make_runner(model)
    warm_up_filters(runner, 4, vocab_size=100)
    assert [batch.query_lens for batch in model.batches] == [[1] * 4]
    assert [row[0] for row in page_table(model.batches[-1])] == [0, 1, 2, 3]
    assert model.batches[-1].write_index.tolist() == [page * PAGE for page in range(4)]


def test_decode_steps_over_pages_make_what_one_pass_over_all_tokens_makes() -> None:
    decoder = tiny_decoder()
    kv = KVCache.allocate(decoder.config, NUM_PAGES, PAGE, torch.float32, CPU)
    runner = SyncStepRunner(decoder, kv, CPU, num_slots=2, max_pages=8)
    request = make_request(random_prompt(6, 3), [29, 17], slot=1)
    request.token_ids += runner.launch(StepPlan([Row(request, 0, 6, True, False)])).token_ids()
    for position in range(6, 20):
        if position % PAGE == 0:
            request.page_ids.append(31 - position)
        made = runner.launch(StepPlan([Row(request, position, 1, True, position % 2 == 0)]))
        request.token_ids += made.token_ids()
    for length in range(6, 21):
        fresh = make_request(request.token_ids[:length], list(range(8)), slot=0)
        (last,) = runner.launch(StepPlan([Row(fresh, 0, length, True, False)])).token_ids()
        assert last == request.token_ids[length]

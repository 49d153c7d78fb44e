"""The CUDA runner with graphs that share their memory: pages, tokens and results where they belong.

The model is a table (`table_model.py`): its tokens are equal on every device, so that one that was read too
early, or from another step, shows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.shared.engine.cuda_attention import CudaAttention
from phloem.shared.engine.cuda_calls import CudaCalls
from phloem.shared.engine.cuda_runner import CudaStepRunner, DecodeParts
from phloem.shared.engine.decode_tables import DecodeTables
from phloem.shared.engine.grammar.masks import TokenMasks
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.offline.null_device import NullLane
from phloem.shared.engine.step_inputs import RunnerSizes
from phloem.shared.engine.step_plan import DecodeBatch, DecodeStep, Row, StepPlan
from phloem.shared.protocol.session import SamplingParams
from tests.support.requests import make_request
from tests.support.runner_world import MAX_PAGES, PAGE, SLOTS, RunnerDevice, answers_of
from tests.support.table_model import VOCAB, TableModel

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")


def make_runner(num_pages: int) -> tuple[CudaStepRunner, TableModel]:
    model = TableModel(CUDA, PAGE)
    sizes = RunnerSizes(SLOTS, MAX_PAGES, 64, PAGE, num_pages)
    tables = DecodeTables(CUDA, num_slots=SLOTS + 1, max_pages=MAX_PAGES, page_size=PAGE, num_kv_heads=2)
    nothing = torch.zeros(0)
    runner = CudaStepRunner(
        model,
        KVCache([nothing], [nothing]),
        CUDA,
        CudaAttention({0: (NullLane(sizes), NullLane(sizes))}),
        sizes,
        DecodeParts(model, tables, nothing, nothing),
    )
    runner.capture([1, 2, 4, SLOTS], lambda done, total: None)
    return runner, model


@pytest.mark.parametrize("num_pages", [200, 40])
def test_answers_are_the_models(num_pages: int) -> None:
    """Two steps under way at any time; requests come, end, and with few pages are retracted."""
    runner, model = make_runner(num_pages)
    device = RunnerDevice(runner, num_pages)
    for _ in range(3):
        answers = answers_of(device, num_pages)
        for request_id, submit in answers.submits.items():
            assert answers.tokens[request_id] == model.answer(submit.token_ids, submit.sampling), request_id
    assert (answers.num_retractions > 0) == (num_pages == 40)
    assert device.num_captured > 180


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_masked_rows_are_drawn_again_from_the_graphs_logits(temperature: float) -> None:
    runner, model = make_runner(64)
    sampling = SamplingParams(max_tokens=9, temperature=temperature, seed=5)
    requests = [make_request(slot, list(range(5 * slot, 5 * slot + 5)), sampling) for slot in range(3)]
    runner.launch(StepPlan([Row(request, 0, 2, False, False) for request in requests])).token_ids()
    batch = DecodeBatch(requests)
    batch.constrained = [1]
    positions = torch.tensor([2, 2, 2]).numpy()
    known = [request.token_ids[-1] for request in requests]
    step = runner.launch(StepPlan.of_decodes(DecodeStep(batch, positions, known, [])))
    bitmask = torch.zeros((1, -(-VOCAB // 32)), dtype=torch.int32)
    bitmask[0, 4321 // 32] = 1 << (4321 % 32)
    step.sample(TokenMasks(torch.tensor([1]).pin_memory(), bitmask.pin_memory()))
    first = step.token_ids()
    batch.constrained = []
    after = runner.launch(StepPlan.of_decodes(DecodeStep(batch, positions + 1, None, []))).token_ids()
    answers = [model.answer(request.token_ids, sampling)[:2] for request in requests]
    assert first == [answers[0][0], 4321, answers[2][0]]
    assert after[1] == model.answer([*requests[1].token_ids, 4321], sampling)[0]
    assert [after[0], after[2]] == [answers[0][1], answers[2][1]]


def test_graphs_of_one_pool_leave_their_logits_in_turn() -> None:
    calls = CudaCalls(CUDA)
    source = torch.zeros(64, 128_256, device=CUDA)
    graphs = {}

    def doubled(size: int) -> Tensor:
        return (source[:size] * 2).contiguous()

    for size in (64, 48, 32):
        graphs[size] = calls.capture(lambda size=size: doubled(size))  # type: ignore[misc]
    for round_index, size in enumerate([32, 64, 48, 64, 32, 48]):
        source.fill_(round_index + 1.0)
        graphs[size].replay()
        assert graphs[size].logits.shape == (size, 128_256)
        assert bool((graphs[size].logits == 2.0 * (round_index + 1)).all())
    assert len({graph.logits.data_ptr() for graph in graphs.values()}) == 1, "all lie in one place"


def test_kernels_read_and_write_pinned_memory_in_a_graph() -> None:
    """A replay puts its tokens where the turn says that it found on the device."""
    rows, vocab = 7, 128_256
    logits = torch.randn(rows, vocab, device=CUDA) * 3
    temperature = torch.tensor([0.0, 1.0, 0.7, 0.0, 0.3, 2.0, 1.0])
    seed, slot = torch.randint(-(2**62), 2**62, (rows,)), torch.randperm(9)[:rows]
    position = torch.arange(rows) + 100
    last_token = torch.zeros(9, dtype=torch.int64, device=CUDA)
    results = torch.zeros((3, 12), dtype=torch.int64).pin_memory()
    turn = torch.zeros(4, dtype=torch.int32, device=CUDA)
    table = torch.zeros((50, 100), dtype=torch.int32, device=CUDA)
    pairs = torch.stack((torch.randperm(5000)[:600], torch.arange(600) + 1), 1).to(torch.int32)
    heat, seeds, positions, slots = (tensor.to(CUDA) for tensor in (temperature, seed, position, slot))
    pairs_in = pairs.to(CUDA)

    def step() -> Tensor:
        ops.place_pages(table, turn, pairs_in)
        ops.sample_to_slots(logits, heat, seeds, positions, slots, last_token, results, turn[1:])
        return logits

    captured = CudaCalls(CUDA).capture(step)
    ones, off = torch.ones(rows), torch.zeros(rows, dtype=torch.int64)
    expected = ops.sample(logits.cpu(), temperature, off, ones, ones * 0, seed, position)
    for number in (2, 0, 1):
        results.zero_()
        turn.copy_(torch.tensor([600, number, 0, 0], dtype=torch.int32))
        captured.replay()
        torch.cuda.synchronize()
        assert torch.equal(results[number, :rows], expected)
        assert int(results.count_nonzero()) == int(expected.count_nonzero())
        assert torch.equal(last_token.cpu()[slot], expected)
    placed = torch.zeros(5000, dtype=torch.int32)
    placed[pairs[:, 0].long()] = pairs[:, 1]
    assert torch.equal(table.cpu().view(-1), placed)

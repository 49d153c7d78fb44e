"""The CUDA runner on a CPU, with a device that is always late: its tokens are the synchronous runner's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from phloem.kernels import ops
from phloem.kernels.flashinfer_ops.page_lists import PagedRows
from phloem.kernels.triton_ops.key_shares import MANY, ONE_EACH
from phloem.kernels.types import CudaError, DecodeRows
from phloem.shared.engine.cooperative_steps import CooperativeStep, CooperativeSteps, steps_of
from phloem.shared.engine.cuda_attention import CudaAttention
from phloem.shared.engine.cuda_runner import CudaStepRunner, DecodeForward, DecodeParts
from phloem.shared.engine.decode_tables import DecodeTables
from phloem.shared.engine.grammar.masks import TokenMasks
from phloem.shared.engine.models.batch import ForwardBatch
from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.requests import Request
from phloem.shared.engine.step_inputs import RunnerSizes
from phloem.shared.engine.step_plan import DecodeBatch, DecodeStep, Row, StepPlan
from phloem.shared.engine.step_runner import LaunchedStep, LayerWatch, SyncStepRunner
from phloem.shared.engine.warmup import warm_up_filters
from phloem.shared.protocol.session import SamplingParams
from tests.support.late_device import LateDevice
from tests.support.requests import make_request
from tests.support.runner_world import MAX_PAGES, PAGE, SLOTS, RunnerDevice, answers_of
from tests.support.table_model import TableModel
from tests.support.tiny_model import VOCAB, tiny_decoder

CPU = torch.device("cpu")


class TableForward:
    """The decode pass as the decoder's own: from the page table and the work, as the kernels find them."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def forward(self, rows: DecodeRows, kv: KVCache) -> Tensor:
        positions = torch.zeros_like(rows.slot)
        for row, slot, position, *_ in rows.work.tolist():
            if row >= 0:
                positions[row] = position
                assert slot == rows.slot[row]
        batch = ForwardBatch(
            input_ids=torch.where(rows.token < 0, rows.last_token[rows.slot], rows.token),
            positions=positions,
            write_index=rows.write_index,
            query_lens=[1] * len(positions),
            kv_lens=(positions + 1).tolist(),
            page_table=rows.page_table[rows.slot].long(),
        )
        return self._decoder.forward(batch, kv)


class ReferencePart:
    def __init__(self, rows: PagedRows) -> None:
        table = torch.from_numpy(rows.page_table[rows.slots]).long()
        self._plan = ops.plan_attention(rows.query_lens.tolist(), rows.kv_lens.tolist(), table, PAGE)

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float, out: Tensor) -> None:
        out.copy_(ops.paged_attention(q, k_pages, v_pages, self._plan, scale))


class ReferenceLane:
    def plan(self, rows: PagedRows, *, in_graph: bool) -> ReferencePart:
        return ReferencePart(rows)


class TwoRows:
    """Stands for the kernel of whole steps: takes two rows, and counts them."""

    sharing = ONE_EACH

    def __init__(self, forward: DecodeForward, kv: KVCache) -> None:
        self._forward, self._kv, self.num_steps = forward, kv, 0

    def takes(self, num_rows: int) -> bool:
        return num_rows <= 2

    def __call__(self, rows: DecodeRows) -> Tensor:
        self.num_steps += 1
        return self._forward.forward(rows, self._kv)


class Rig:
    """A runner over a tiny decoder, and its device. With `is_alone`, steps of two rows have a kernel of
    their own."""

    def __init__(
        self, num_pages: int, model: TableModel | None = None, is_alone: Callable[[], bool] | None = None
    ) -> None:
        decoder = tiny_decoder()
        self.calls = LateDevice()
        kv = KVCache.allocate(decoder.config, num_pages + 1, PAGE, torch.float32, CPU)
        tables = DecodeTables(
            CPU,
            num_slots=SLOTS + 1,
            max_pages=MAX_PAGES,
            page_size=PAGE,
            num_kv_heads=decoder.config.num_kv_heads,
        )
        nothing = torch.zeros(0)
        forward: DecodeForward = model or TableForward(decoder)
        self.two_rows = TwoRows(forward, kv)
        cooperative = CooperativeSteps([self.two_rows], is_alone) if is_alone is not None else None
        self.runner = CudaStepRunner(
            model or decoder,
            kv,
            CPU,
            CudaAttention({0: (ReferenceLane(), ReferenceLane())}),
            RunnerSizes(SLOTS, MAX_PAGES, 64, PAGE, num_pages),
            DecodeParts(forward, tables, nothing, nothing, cooperative),
            self.calls,
        )
        self.runner.capture([2, SLOTS], lambda done, total: None)
        self.calls.late = True

    def launch(self, plan: StepPlan, watch: LayerWatch | None = None) -> LaunchedStep:
        """Other steps than captured ones are computed at once: as behind a device that has caught up."""
        if plan.decode is not None:
            return self.runner.launch(plan, watch)
        self.calls.finish()
        self.calls.late = False
        step = self.runner.launch(plan, watch)
        self.calls.late = True
        return step


@pytest.mark.parametrize("num_pages", [200, 40])
def test_tokens_are_those_of_the_synchronous_runner(num_pages: int) -> None:
    decoder = tiny_decoder()
    kv = KVCache.allocate(decoder.config, num_pages, PAGE, torch.float32, CPU)
    plain = SyncStepRunner(decoder, kv, CPU, num_slots=SLOTS, max_pages=MAX_PAGES)
    expected = answers_of(RunnerDevice(plain, num_pages), num_pages)
    device = RunnerDevice(Rig(num_pages), num_pages)
    found = answers_of(device, num_pages)
    assert found.tokens == expected.tokens
    assert device.num_captured > 60
    assert (found.num_retractions > 0) == (num_pages == 40)


def test_model_of_the_test_on_the_gpu_tells_right_from_wrong() -> None:
    """`tests/gpu/test_captured_steps.py` in little."""
    model = TableModel(CPU, PAGE)
    device = RunnerDevice(Rig(200, model=model), 200)
    answers = answers_of(device, 200)
    for request_id, submit in answers.submits.items():
        expected = model.answer(submit.token_ids, submit.sampling)
        assert answers.tokens[request_id] == expected and 0 not in expected


def test_steps_are_cooperative_while_no_channel_is_open() -> None:
    channels, made = [0], []
    for is_alone in (lambda: not channels[0], None):
        rig = Rig(200, is_alone=is_alone)
        requests = prefilled(rig, SamplingParams(max_tokens=8, temperature=0.0))
        batch, positions = DecodeBatch(requests), np.array([2, 2])
        tokens: list[list[int]] = []
        for step, channels[0] in enumerate((0, 1, 0)):
            before, known = rig.two_rows.num_steps, tokens[-1] if tokens else [2, 7]
            launched = rig.launch(StepPlan.of_decodes(DecodeStep(batch, positions + step, known, [])))
            tokens.append(launched.token_ids())
            alone = is_alone is not None and not channels[0]
            assert rig.two_rows.num_steps - before == alone
        made.append(tokens)
    assert made[0] == made[1]


def test_one_kernel_that_is_refused_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(200)

    def refused() -> CooperativeStep:
        raise CudaError("NVRTC: no such instruction")

    assert steps_of((refused, lambda: None, lambda: rig.two_rows)) == [rig.two_rows]
    assert "no such instruction" in caplog.text and "--disable-cooperative-decode" in caplog.text


def test_first_step_that_takes_the_rows_makes_them() -> None:
    class FourRows(TwoRows):
        sharing = MANY

        def takes(self, num_rows: int) -> bool:
            return num_rows <= 4

    few, more = Rig(200).two_rows, FourRows(TableForward(tiny_decoder()), Rig(200).two_rows._kv)
    steps = CooperativeSteps([few, more], lambda: True)
    assert [steps.takes(count) for count in (1, 2, 3, 4, 5)] == [True, True, True, True, False]
    assert [steps.sharing(count) for count in (2, 3, 5)] == [ONE_EACH, MANY, MANY]
    assert CooperativeSteps([few, more], lambda: False).sharing(2) == MANY


def prefilled(rig: Rig, sampling: SamplingParams, count: int = 2) -> list[Request]:
    """Requests of three tokens, the last of which is still to be computed."""
    requests = [make_request(slot, list(range(5 * slot, 5 * slot + 5)), sampling) for slot in range(count)]
    rig.launch(StepPlan([Row(request, 0, 2, False, False) for request in requests])).token_ids()
    return requests


class CountedOps(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's stubs
    """Tensor operations: each would be a launch on CUDA, or at least a call into torch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_steady_step_is_one_copy_one_replay_and_one_event() -> None:
    rig = Rig(40)
    for temperature in (0.0, 0.9):
        requests = prefilled(rig, SamplingParams(max_tokens=9, temperature=temperature))
        batch = DecodeBatch(requests)
        counted = []
        for step_index in range(16):
            positions = torch.tensor([2, 2]).numpy() + step_index
            tokens = [request.token_ids[-1] for request in requests] if step_index == 0 else None
            plan = StepPlan.of_decodes(DecodeStep(batch, positions, tokens, []))
            rig.calls.asked.clear()
            with CountedOps() as operations:
                step = rig.launch(plan)
            counted.append((rig.calls.asked[:], operations.names))
            assert len(step.token_ids()) == 2
        assert [asked for asked, _ in counted] == [["send", "replay", "mark"]] * 16
        # Views of the pinned buffers, with and without new pages, are made when their turn comes first.
        assert [names for _, names in counted[12:]] == [[]] * 4


def test_masked_rows_are_drawn_again_and_go_on_from_there() -> None:
    """The graph's own choice is overwritten, for the host and for the step after."""
    rig, twin = Rig(40), Rig(40)
    allowed = 77
    bitmask = torch.zeros((1, -(-VOCAB // 32)), dtype=torch.int32)
    bitmask[0, allowed // 32] = 1 << (allowed % 32)
    masks = TokenMasks(torch.tensor([1]), bitmask)
    made = []
    for world, is_masked in ((rig, True), (twin, False)):
        requests = prefilled(world, SamplingParams(max_tokens=9, temperature=0.7, seed=5))
        batch = DecodeBatch(requests)
        if is_masked:
            batch.constrained = [1]
        known = [request.token_ids[-1] for request in requests]
        positions = torch.tensor([2, 2]).numpy()
        step = world.launch(StepPlan.of_decodes(DecodeStep(batch, positions, known, [])))
        if is_masked:
            assert not step.ready(), "it is not sampled"
            step.sample(masks)
        first = step.token_ids()
        batch.constrained = []
        tokens = None if is_masked else [first[0], allowed]
        after = world.launch(StepPlan.of_decodes(DecodeStep(batch, positions + 1, tokens, [])))
        made.append((first, after.token_ids()))
    (masked, masked_after), (free, free_after) = made
    assert masked == [free[0], allowed] and free[1] != allowed
    assert masked_after == free_after


class NotedOps:
    """The names of ops that were called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.called: list[str] = []
        for name in names:
            monkeypatch.setattr(ops, name, partial(self._call, name, getattr(ops, name)))

    def _call(self, name: str, plain: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.called.append(name)
        return plain(*args, **options)


@pytest.mark.parametrize("rows", [1, SLOTS])
def test_warm_up_draws_with_filters_and_a_mask(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = NotedOps(monkeypatch, "apply_bitmask", "sample")
    warm_up_filters(Rig(200), rows, VOCAB)
    assert noted.called == ["apply_bitmask", "sample"]


@pytest.mark.parametrize(("temperature", "drawn"), [(0.0, []), (0.7, ["sample"])])
def test_filters_of_greedy_requests_cost_nothing(
    temperature: float, drawn: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(200)
    requests = prefilled(rig, SamplingParams(max_tokens=8, temperature=temperature, top_p=0.9, top_k=5))
    noted = NotedOps(monkeypatch, "sample")
    step = DecodeStep(DecodeBatch(requests), np.array([2, 2]), [2, 7], [])
    assert len(rig.launch(StepPlan.of_decodes(step)).token_ids()) == 2
    assert noted.called == drawn

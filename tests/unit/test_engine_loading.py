"""An engine's start where memory runs out: by a gauge that says so, and by a torch that raises."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import msgspec
import pytest
import torch

from phloem.shared.engine import loading
from phloem.shared.engine.backend import ModelFacts
from phloem.shared.engine.config import EngineOptions
from phloem.shared.engine.loading import ModelLoading, is_out_of_memory, load_model, out_of_memory_as
from phloem.shared.engine.memory import MARGIN_BYTES, DeviceMemory
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.rehearsal import HostGauge, measure_overhead
from phloem.shared.engine.runners import for_device
from phloem.shared.engine.sizing import CPU_MAX_TOKENS, host_pool_pages
from phloem.shared.engine.step_advice import Rehearsal
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.engine import EngineUp, Progress
from phloem.shared.transfer.config import NCCL_BYTES_PER_CTA
from tests.support.tiny_model import tiny_decoder

CPU = torch.device("cpu")
GB = 10**9
PAGE_BYTES = 2 * 2 * 16 * 2 * 16 * 4  # layers, K and V, tokens, heads, head_dim, float32
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "vocab_size": 100,
    "dtype": "float32",
}


@pytest.fixture
def options(tmp_path: Path) -> EngineOptions:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return for_device(
        EngineOptions(model_path=str(tmp_path), load_format="dummy", max_total_tokens=1024, device="cpu"), CPU
    )


class FakeGauge:
    """A device of 80 GB, of which things hold what they say as long as they live."""

    def __init__(self) -> None:
        self.held = 10 * GB
        self.num_releases = 0

    def read(self) -> DeviceMemory:
        return DeviceMemory("GPU", 80 * GB, 80 * GB - self.held, self.held)

    def release(self) -> None:
        gc.collect()
        self.num_releases += 1

    def hold(self, num_bytes: int) -> Holder:
        holder = Holder()
        self.held += num_bytes
        weakref.finalize(holder, self._give_back, num_bytes)
        return holder

    def _give_back(self, num_bytes: int) -> None:
        self.held -= num_bytes


class Holder:
    pass


def test_rehearsal_counts_all_but_the_pool_and_frees_everything() -> None:
    gauge = FakeGauge()
    overhead = measure_overhead(gauge, lambda: (gauge.hold(3 * GB), gauge.hold(GB)), pool_bytes=GB)
    assert overhead == 3 * GB
    assert gauge.held == 10 * GB and gauge.num_releases == 2


def test_rehearsal_beside_a_process_that_ends_meanwhile_is_not_negative() -> None:
    gauge = FakeGauge()

    def rehearse() -> Holder:
        gauge.held -= 5 * GB
        return gauge.hold(GB)

    assert measure_overhead(gauge, rehearse, pool_bytes=GB) == 0


def test_host_gauge_reads_this_machine() -> None:
    memory = HostGauge().read()
    assert memory.name == "this machine"
    assert 0 < memory.free <= memory.total


def test_model_starts_with_its_stages_in_order(options: EngineOptions) -> None:
    stages: list[str] = []

    def note(message: EngineUp) -> None:
        assert isinstance(message, Progress)
        stages.append(message.stage)

    model, _ = load_model(options, CPU, note)
    assert list(dict.fromkeys(stages)) == ["weights", "warmup"]
    assert (model.num_pages, model.context_length) == (64, 256)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("The size of tensor a (3) must match"), False),
    ],
)
def test_which_errors_mean_that_memory_has_run_out(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
    with (
        pytest.raises(PhloemError if expected else type(error)),
        out_of_memory_as(lambda: PhloemError("x", "y")),
    ):
        raise error


def raising(*_: object, **__: object) -> object:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("part", "param", "words"),
    [
        ("load_decoder", "device", "the weights need"),
        ("build_runner", "cuda_graph_max_bs", "CUDA graphs for up to 64 requests do not fit"),
        ("warm_up_runner", "chunked_prefill_size", "a step of 2048 tokens and 64 requests"),
    ],
)
def test_each_stage_names_its_own_number(
    part: str, param: str, words: str, options: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, part, raising)
    with pytest.raises(PhloemError, match=words) as caught:
        load_model(options, CPU, lambda message: None)
    assert (caught.value.code, caught.value.info.param) == ("out_of_memory", param)
    assert "this machine" in str(caught.value)


@pytest.mark.parametrize("window", [None, 128])
def test_kernels_are_chosen_by_what_the_model_is(
    window: int | None, options: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(options.model_path) / "config.json"
    mistral = {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    path.write_text(json.dumps(CONFIG | mistral))
    asked: list[ModelFacts] = []

    def pick(options: object, device: object, facts: ModelFacts, send: object) -> str:
        asked.append(facts)
        return "torch"

    monkeypatch.setattr(loading, "pick_backend", pick)
    load_model(options, CPU, lambda message: None)
    assert asked == [ModelFacts("float32", 16, has_windows=window is not None)]


@pytest.mark.parametrize("asked", [0.0, 0.02, 0.04, 0.3])
def test_share_of_memory_is_honoured_on_a_cpu(
    asked: float, options: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 1000 * PAGE_BYTES
    monkeypatch.setattr(HostGauge, "read", lambda self: DeviceMemory("this machine", 2 * free, free, 0))
    flags = msgspec.structs.replace(options, max_total_tokens=0, mem_fraction_static=asked)
    model, _ = load_model(for_device(flags, CPU), CPU, lambda message: None)
    assert model.num_pages == {0.0: 125, 0.02: 20, 0.04: 40, 0.3: 300}[asked]


def test_where_no_share_was_asked_for_a_cpu_pool_is_no_larger_than_useful(
    options: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 100 * GB
    monkeypatch.setattr(HostGauge, "read", lambda self: DeviceMemory("this machine", 2 * free, free, 0))
    flags = msgspec.structs.replace(options, max_total_tokens=0)
    assert host_pool_pages(flags, PAGE_BYTES, 256) == CPU_MAX_TOKENS // 16
    asked = msgspec.structs.replace(flags, mem_fraction_static=0.5)
    assert host_pool_pages(asked, PAGE_BYTES, 256) == free // 2 // PAGE_BYTES


def test_share_of_a_gpu_is_its_default_until_it_is_asked_for() -> None:
    at = torch.device("cuda:0")
    assert for_device(EngineOptions(), at).mem_fraction_static == 0.85
    assert for_device(EngineOptions(mem_fraction_static=0.3), at).mem_fraction_static == 0.3


def test_pool_that_can_not_be_allocated_names_one_that_can(
    options: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVCache, "allocate", raising)
    with pytest.raises(PhloemError, match=r"KV pages for 1024 tokens.*--max-total-tokens \d+") as caught:
        load_model(options, CPU, lambda message: None)
    assert caught.value.info.param == "mem_fraction_static"


def test_rehearsal_whose_pages_can_not_be_allocated_names_the_flags_that_decide_them(
    options: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the pool, which have no say in it."""
    monkeypatch.setattr(KVCache, "allocate", raising)
    flags = msgspec.structs.replace(options, max_running_requests=8, transfer_peers=1)
    loading_ = ModelLoading(flags, torch.device("cuda:0"), lambda message: None, FakeGauge())
    with pytest.raises(PhloemError, match="KV pages for a step of 2048 tokens and 8 requests") as caught:
        loading_.pool(tiny_decoder(), "triton")
    assert caught.value.info.param == "chunked_prefill_size"
    assert "did not: beside them 70.0 GB of GPU's 80.0 GB were free: lower --" in str(caught.value)
    assert "--chunked-prefill-size to 1024, or stop what else uses the device" in str(caught.value)


class RehearsedLoading(ModelLoading):
    """On a device that is not there: the rehearsal holds what the test says."""

    def __init__(
        self, options: EngineOptions, gauge: FakeGauge, overhead: int, messages: list[EngineUp]
    ) -> None:
        super().__init__(options, torch.device("cuda:0"), messages.append, gauge)
        self._fake, self._overhead = gauge, overhead
        self.rehearsed_pages = 0

    def _rehearse(self, decoder: object, backend: object, rehearsal: Rehearsal) -> object:
        self.rehearsed_pages = rehearsal.num_pages(rehearsal.sizes)
        return self._fake.hold(self._overhead + (self.rehearsed_pages + 1) * PAGE_BYTES)


def test_cuda_pool_is_what_the_rehearsal_leaves(options: EngineOptions) -> None:
    flags = msgspec.structs.replace(
        options,
        device="cuda:0",
        max_total_tokens=0,
        mem_fraction_static=0.99,
        max_running_requests=100,
        transfer_peers=5,
    )
    messages: list[EngineUp] = []
    gauge = FakeGauge()
    loading_ = RehearsedLoading(flags, gauge, 4 * GB, messages)
    pages, beside = loading_.pool(tiny_decoder(), "triton")
    assert loading_.rehearsed_pages == 100, "a step of as many requests as may run"
    staging = (flags.transfer_peers - 1 + flags.staging_slots) * flags.staging_bytes
    nccl = flags.transfer_peers * 2 * flags.transfer_max_ctas * NCCL_BYTES_PER_CTA
    room = 80 * GB - 10 * GB - 4 * GB - MARGIN_BYTES - staging - nccl
    assert (pages + 1) * PAGE_BYTES <= room < (pages + 2) * PAGE_BYTES
    assert gauge.held == 10 * GB
    assert beside == 4 * GB + staging + nccl
    assert messages == [Progress("memory", 0, 1), Progress("memory", 1, 1)]

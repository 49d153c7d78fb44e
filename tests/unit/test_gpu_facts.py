"""What an engine does with what it finds: devices passed over or refused, kernels compiled or not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from phloem.shared.engine import gpu_facts
from phloem.shared.engine.backend import GpuFacts, ModelFacts
from phloem.shared.engine.config import EngineOptions
from phloem.shared.engine.runners import find_device, pick_backend
from phloem.shared.errors import ConfigError
from phloem.shared.protocol.engine import EngineUp, Progress

CUDA = torch.device("cuda:0")
MODEL = ModelFacts("bfloat16", 128)
H100 = GpuFacts("NVIDIA H100", (9, 0), ("sm_90",), has_triton=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Makes torch see two devices of a compute capability."""

    def appear(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])

    return appear


@pytest.mark.parametrize(
    ("name", "found"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_device_of_a_flag(name: str, found: str, gpu: Callable[[tuple[int, int]], None]) -> None:
    gpu((9, 0))
    assert str(find_device(name)) == found


def test_device_that_is_not_there_is_refused(gpu: Callable[[tuple[int, int]], None]) -> None:
    gpu((9, 0))
    with pytest.raises(ConfigError, match="there are 2 CUDA devices, counted from 0"):
        find_device("cuda:2")


def test_auto_passes_over_a_gpu_that_is_too_old_and_says_why(
    gpu: Callable[[tuple[int, int]], None], caplog: pytest.LogCaptureFixture
) -> None:
    gpu((7, 5))
    assert str(find_device("auto")) == "cpu"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "running on the CPU: NVIDIA X (compute capability 7.5) is not supported" in record.getMessage()


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_gpu_that_is_too_old_is_refused_when_it_was_named(
    name: str, gpu: Callable[[tuple[int, int]], None]
) -> None:
    gpu((7, 5))
    with pytest.raises(ConfigError, match=r"compute capability 7\.5\) is not supported"):
        find_device(name)


def test_machine_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(find_device("auto")) == "cpu"
    with pytest.raises(ConfigError, match="torch sees no CUDA device; use --device cpu"):
        find_device("cuda")


# -- FlashInfer ---------------------------------------------------------------------------------------------


def test_flashinfer_must_be_there_in_the_pinned_version(
    gpu: Callable[[tuple[int, int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu((9, 0))

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(gpu_facts, "version", absent)
    assert "not installed" in str(gpu_facts.find_gpu_facts(CUDA, MODEL).flashinfer_problem)
    monkeypatch.setattr(gpu_facts, "version", lambda name: "9.9")
    problem = gpu_facts.find_gpu_facts(CUDA, MODEL).flashinfer_problem
    assert problem == "flashinfer-python is 9.9, and 0.6.14 is needed (pip install phloem[gpu])"


def test_nvcc_is_looked_for_where_flashinfer_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_facts.find_nvcc() is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(0o755)
    assert gpu_facts.find_nvcc() == tmp_path / "bin" / "nvcc"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert gpu_facts.find_nvcc() == tmp_path / "bin" / "nvcc"


class Compiler:
    """In place of FlashInfer's: takes two kernels, and fails if told to."""

    def __init__(self, failure: str | None = None) -> None:
        self.failure = failure

    def __call__(
        self, device: torch.device, model: ModelFacts, progress: Callable[[int, int], None]
    ) -> str | None:
        for done in range(3):
            progress(done, 2)
        return self.failure


def pick(
    monkeypatch: pytest.MonkeyPatch, compiler: Compiler, options: EngineOptions
) -> tuple[str, list[EngineUp]]:
    cold = H100._replace(missing_kernels=("a", "b"), can_compile=True)
    monkeypatch.setattr(gpu_facts, "find_gpu_facts", lambda device, model: cold)
    monkeypatch.setattr(gpu_facts, "compile_kernels", compiler)
    sent: list[EngineUp] = []
    return pick_backend(options, CUDA, MODEL, sent.append), sent


def test_missing_kernels_are_compiled_with_progress(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend, sent = pick(monkeypatch, Compiler(), EngineOptions())
    assert backend == "flashinfer"
    assert sent == [Progress("flashinfer_kernels", done, 2) for done in range(3)]
    assert "FlashInfer compiles 2 kernels first" in caplog.text


def test_kernels_that_can_not_be_compiled_are_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend, _ = pick(monkeypatch, Compiler("ninja failed"), EngineOptions())
    assert backend == "triton"
    assert "its kernels could not be compiled (ninja failed)" in caplog.text


def test_flashinfer_by_name_is_refused_when_its_kernels_can_not_be_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"could not be compiled \(ninja failed\)"):
        pick(monkeypatch, Compiler("ninja failed"), EngineOptions(attention_backend="flashinfer"))


def test_kernels_for_hopper_that_can_not_be_made_are_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without = H100._replace(has_cuda_bindings=False)
    monkeypatch.setattr(gpu_facts, "find_gpu_facts", lambda device, model: without)
    assert pick_backend(EngineOptions(), CUDA, MODEL, lambda message: None) == "flashinfer"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "cuda.bindings is missing" in record.getMessage()


def test_cuda_bindings_are_looked_for(
    gpu: Callable[[tuple[int, int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu((9, 0))
    for found in (False, True):
        monkeypatch.setattr(gpu_facts, "has_bindings", lambda found=found: found)
        assert gpu_facts.find_gpu_facts(CUDA, MODEL).has_cuda_bindings == found


def test_triton_by_name_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick(monkeypatch, Compiler("never asked"), EngineOptions(attention_backend="triton")) == (
        "triton",
        [],
    )

"""Which backend an engine takes or why it refuses, over a table of devices, models and software."""

from __future__ import annotations

import pytest

from phloem.shared.engine.backend import (
    Choice,
    GpuFacts,
    ModelFacts,
    Refusal,
    choose_backend,
    decode_fallback,
    refuse_device,
)
from phloem.shared.engine.config import AttentionBackend, EngineOptions

H100 = GpuFacts("NVIDIA H100", (9, 0), ("sm_80", "sm_90"), has_triton=True)
COLD = H100._replace(missing_kernels=("decode", "prefill"))
LLAMA = ModelFacts("bfloat16", 128)


def choice(wanted: AttentionBackend, gpu: GpuFacts | None, model: ModelFacts = LLAMA) -> Choice:
    found = choose_backend(wanted, gpu, model)
    assert isinstance(found, Choice), found
    return found


def refusal(wanted: AttentionBackend, gpu: GpuFacts | None, model: ModelFacts = LLAMA) -> Refusal:
    found = choose_backend(wanted, gpu, model)
    assert isinstance(found, Refusal), found
    return found


@pytest.mark.parametrize("wanted", ["auto", "torch"])
def test_cpu_takes_torch_without_a_note(wanted: AttentionBackend) -> None:
    assert choice(wanted, None) == Choice("torch")


@pytest.mark.parametrize("wanted", ["flashinfer", "triton"])
def test_cpu_refuses_a_device_backend_by_name(wanted: AttentionBackend) -> None:
    assert refusal(wanted, None) == Refusal(
        f"--attention-backend {wanted} needs a CUDA device; on a CPU use torch", "attention_backend"
    )


@pytest.mark.parametrize("wanted", ["auto", "flashinfer"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_flashinfer_is_taken_where_it_has_kernels(
    wanted: AttentionBackend, head_dim: int, dtype: str
) -> None:
    assert choice(wanted, H100, ModelFacts(dtype, head_dim)) == Choice("flashinfer")


@pytest.mark.parametrize(
    ("gpu", "model", "reason"),
    [
        (H100._replace(flashinfer_problem="flashinfer is broken"), LLAMA, "flashinfer is broken"),
        (H100, ModelFacts("float32", 128), "no kernels for float32"),
        (H100, ModelFacts("bfloat16", 96), "this model has 96"),
        (COLD, LLAMA, "2 of its kernels for bfloat16 and head_dim 128 are not compiled and there is no nvcc"),
    ],
)
def test_without_flashinfer_auto_takes_triton_and_the_name_is_refused_for_the_same_reason(
    gpu: GpuFacts, model: ModelFacts, reason: str
) -> None:
    taken = choice("auto", gpu, model)
    assert taken.backend == "triton"
    (note,) = taken.notes
    assert note.startswith("attention by triton instead of flashinfer: ") and reason in note
    refused = refusal("flashinfer", gpu, model)
    assert reason in refused.message and refused.message.startswith("--attention-backend flashinfer")
    assert refused.param == "attention_backend"
    assert choice("triton", gpu, model) == Choice("triton")


@pytest.mark.parametrize("wanted", ["auto", "flashinfer"])
def test_kernels_that_must_be_compiled_are_announced(wanted: AttentionBackend) -> None:
    taken = choice(wanted, COLD._replace(can_compile=True))
    assert taken.backend == "flashinfer"
    assert taken.compiles == ("decode", "prefill")
    assert "compiles 2 kernels first" in taken.notes[0] and "triton starts at once" in taken.notes[0]


@pytest.mark.parametrize("wanted", ["auto", "flashinfer"])
def test_layers_with_a_window_are_said_to_go_to_triton(wanted: AttentionBackend) -> None:
    windows = LLAMA._replace(has_windows=True)
    assert choice(wanted, H100, windows) == Choice(
        "flashinfer",
        (
            "attention by triton instead of flashinfer in layers with a sliding window, which only triton's "
            "kernels are used for",
        ),
    )
    assert len(choice(wanted, COLD._replace(can_compile=True), windows).notes) == 2
    assert choice("triton", H100, windows) == Choice("triton")


def test_kernels_for_hopper_that_can_not_be_made_are_named_with_the_remedy() -> None:
    without = H100._replace(has_cuda_bindings=False)
    note = decode_fallback(EngineOptions(), without, LLAMA)
    assert note is not None and "pip install cuda-bindings" in note and "by triton instead of" in note
    assert decode_fallback(EngineOptions(), H100, LLAMA) is None


@pytest.mark.parametrize(
    ("options", "capability", "model"),
    [
        (EngineOptions(disable_cooperative_decode=True), (9, 0), LLAMA),
        (EngineOptions(disable_decode_kernels=True), (9, 0), LLAMA),
        (EngineOptions(disable_cuda_graph=True), (9, 0), LLAMA),
        (EngineOptions(attention_backend="torch"), (9, 0), LLAMA),
        (EngineOptions(), (8, 0), LLAMA),
        (EngineOptions(), (9, 0), ModelFacts("float32", 128)),
        (EngineOptions(), (9, 0), ModelFacts("bfloat16", 96)),
        (EngineOptions(), (9, 0), ModelFacts("bfloat16", 128, has_windows=True)),
        (EngineOptions(), (9, 0), ModelFacts("bfloat16", 128, activation="gelu")),
    ],
)
def test_kernels_for_hopper_that_would_not_be_used_are_not_missed(
    options: EngineOptions, capability: tuple[int, int], model: ModelFacts
) -> None:
    without = H100._replace(has_cuda_bindings=False, capability=capability)
    assert decode_fallback(options, without, model) is None


def test_head_that_no_kernel_takes_runs_on_torch_and_says_so() -> None:
    model = ModelFacts("bfloat16", 320)
    taken = choice("auto", H100, model)
    assert taken.backend == "torch"
    assert "up to a head_dim of 256, this model has 320" in taken.notes[0]
    assert "320" in refusal("triton", H100, model).message


def test_torch_on_a_gpu_is_taken_at_its_word_with_a_warning() -> None:
    assert choice("torch", H100).notes[0].startswith("attention by plain torch")


@pytest.mark.parametrize("wanted", ["auto", "flashinfer", "triton", "torch"])
@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5)])
def test_gpu_before_ampere_is_refused_by_every_backend(
    wanted: AttentionBackend, capability: tuple[int, int]
) -> None:
    refused = refusal(wanted, H100._replace(name="Tesla", capability=capability))
    assert refused.param == "device"
    assert f"Tesla (compute capability {capability[0]}.{capability[1]})" in refused.message
    assert "--device cpu" in refused.message


def test_gpu_without_triton_is_refused() -> None:
    refused = refusal("auto", H100._replace(has_triton=False))
    assert refused.param == "device" and "triton is not installed" in refused.message


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((9, 0), ("sm_80", "sm_90"), True),
        ((8, 6), ("sm_80",), True),  # a later minor version of the same major one
        ((8, 0), ("sm_86",), False),
        ((12, 0), ("sm_80", "sm_90"), False),
        ((12, 0), ("sm_90", "compute_90"), True),
        ((9, 0), ("compute_120",), False),
        ((12, 0), ("sm_120",), True),
        ((9, 0), ("sm_90a",), True),
        ((10, 0), ("sm_90a",), False),
        ((10, 3), ("sm_100f",), True),
        ((11, 0), ("sm_100f",), False),
        ((9, 0), (), True),  # nothing known: torch itself will say
        ((9, 0), ("gfx942",), False),
    ],
)
def test_torch_must_have_been_built_for_the_device(
    capability: tuple[int, int], archs: tuple[str, ...], runs: bool
) -> None:
    refused = refuse_device("GPU", capability, archs)
    assert (refused is None) == runs
    if refused is not None:
        assert "this torch was built for" in refused.message

"""Which kernels an engine runs on: decided from facts, before anything is loaded.

wanted              CPU        CUDA device
auto                torch      flashinfer, else triton, else torch; each step down has its reason in the log
torch               torch      torch: plain attention, Triton for the rest
triton, flashinfer  refused    that one, or refused with the reason
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from phloem.kernels.limits import DECODE_HEAD_DIMS, HOPPER, HOPPER_ACTIVATION
from phloem.shared.engine.config import AttentionBackend, EngineOptions

Backend: TypeAlias = Literal["flashinfer", "triton", "torch"]

LEAST_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16, and the oldest that Triton supports
FLASHINFER_HEAD_DIMS = (64, 128, 256)
TRITON_MAX_HEAD_DIM = 256
_TWO_BYTES = ("bfloat16", "float16")


class GpuFacts(NamedTuple):
    """What is known of a CUDA device and of the software for it.

    `torch_archs` are the targets that torch was compiled for ("sm_90", or "compute_90" for code that newer
    devices can translate). `flashinfer_problem` says why FlashInfer can't be used at all; `missing_kernels`
    are its kernels for this model that nobody has compiled yet, `can_compile` whether nvcc is there to do it.
    `has_cuda_bindings`: whether kernels in CUDA C++ can be compiled and launched.
    """

    name: str
    capability: tuple[int, int]
    torch_archs: tuple[str, ...]
    has_triton: bool
    flashinfer_problem: str | None = None
    missing_kernels: tuple[str, ...] = ()
    can_compile: bool = False
    has_cuda_bindings: bool = True


class ModelFacts(NamedTuple):
    dtype: str  # "bfloat16", "float16" or "float32"
    head_dim: int
    has_windows: bool = False  # some layers see no more than the last tokens
    activation: str = "silu"


class Choice(NamedTuple):
    """`notes` say what is done instead of what a user may expect, and why. `compiles` are kernels that
    FlashInfer has to compile first, which takes minutes."""

    backend: Backend
    notes: tuple[str, ...] = ()
    compiles: tuple[str, ...] = ()


class Refusal(NamedTuple):
    """Why the engine can't start, as one sentence with the remedy; `param` is the flag at fault."""

    message: str
    param: str


def choose_backend(wanted: AttentionBackend, gpu: GpuFacts | None, model: ModelFacts) -> Choice | Refusal:
    """The backend of a device (None: the CPU) for a model."""
    if gpu is None:
        if wanted in ("auto", "torch"):
            return Choice("torch")
        return Refusal(
            f"--attention-backend {wanted} needs a CUDA device; on a CPU use torch", "attention_backend"
        )
    refused = refuse_device(gpu.name, gpu.capability, gpu.torch_archs) or _refuse_without_triton(gpu)
    if refused is not None:
        return refused
    match wanted:
        case "auto":
            return _best(gpu, model)
        case "torch":
            return Choice("torch", ("attention by plain torch: many times slower than FlashInfer or Triton",))
        case "triton":
            reason = _against_triton(model)
            return Choice("triton") if reason is None else _named_but(wanted, reason)
        case "flashinfer":
            reason = _against_flashinfer(gpu, model)
            return _flashinfer(gpu, model) if reason is None else _named_but(wanted, reason)


def decode_fallback(options: EngineOptions, gpu: GpuFacts, model: ModelFacts) -> str | None:
    """What decode steps of few requests are made of instead of the kernels for Hopper that the flags ask for,
    and why; None where nothing is missing, or those kernels are for other devices or models."""
    unwanted = (
        options.attention_backend == "torch"
        or options.disable_cuda_graph
        or options.disable_decode_kernels
        or options.disable_cooperative_decode
    )
    is_for = (
        model.dtype in _TWO_BYTES
        and model.head_dim in DECODE_HEAD_DIMS
        and model.activation == HOPPER_ACTIVATION
        and not model.has_windows
    )
    if gpu.has_cuda_bindings or unwanted or gpu.capability != HOPPER or not is_for:
        return None
    return (
        "decode steps of up to 64 requests by triton instead of the kernels for Hopper, a bit slower: "
        "cuda.bindings is missing or finds no NVRTC (pip install cuda-bindings; CUDA builds of torch bring "
        "it); --disable-cooperative-decode silences this"
    )


def refuse_device(name: str, capability: tuple[int, int], torch_archs: tuple[str, ...]) -> Refusal | None:
    """Why no part of the engine runs on this device, or None."""
    shown = f"{name} (compute capability {capability[0]}.{capability[1]})"
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        return Refusal(
            f"{shown} is not supported: the kernels and bfloat16 need {least} (Ampere) or newer; "
            "use --device cpu, or another GPU",
            "device",
        )
    if torch_archs and not any(_runs_on(arch, capability) for arch in torch_archs):
        return Refusal(
            f"this torch was built for {', '.join(torch_archs)}, not for {shown}: install a torch build for "
            "it, or use --device cpu",
            "device",
        )
    return None


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Machine code runs within its major version, from its minor version on; code for `compute_N` on all
    devices from there on. The suffix of sm_90a binds to that very version."""
    kind, _, digits = arch.partition("_")
    exact = digits.endswith("a")
    digits = digits.rstrip("af")
    if len(digits) < 2 or not digits.isdigit():
        return False
    built = int(digits[:-1]), int(digits[-1])
    if exact:
        return built == capability
    if kind == "compute":
        return built <= capability
    return built[0] == capability[0] and built[1] <= capability[1]


def _refuse_without_triton(gpu: GpuFacts) -> Refusal | None:
    if gpu.has_triton:
        return None
    return Refusal(
        f"triton is not installed, and {gpu.name} needs it for rope, KV writes and sampling: install a CUDA "
        "build of torch, which brings it, or use --device cpu",
        "device",
    )


def _best(gpu: GpuFacts, model: ModelFacts) -> Choice:
    no_flashinfer = _against_flashinfer(gpu, model)
    if no_flashinfer is None:
        return _flashinfer(gpu, model)
    no_triton = _against_triton(model)
    if no_triton is None:
        return Choice("triton", (f"attention by triton instead of flashinfer: {no_flashinfer}",))
    return Choice("torch", (f"attention by plain torch, many times slower: {no_triton}",))


def _flashinfer(gpu: GpuFacts, model: ModelFacts) -> Choice:
    notes = []
    if model.has_windows:
        notes.append(
            "attention by triton instead of flashinfer in layers with a sliding window, which only triton's "
            "kernels are used for"
        )
    if gpu.missing_kernels:
        notes.append(
            f"FlashInfer compiles {len(gpu.missing_kernels)} kernels first, once, which takes minutes; "
            "--attention-backend triton starts at once"
        )
    return Choice("flashinfer", tuple(notes), gpu.missing_kernels)


def _against_flashinfer(gpu: GpuFacts, model: ModelFacts) -> str | None:
    if gpu.flashinfer_problem is not None:
        return gpu.flashinfer_problem
    if model.dtype not in _TWO_BYTES:
        return f"it has no kernels for {model.dtype} (--dtype bfloat16 would have)"
    if model.head_dim not in FLASHINFER_HEAD_DIMS:
        known = ", ".join(map(str, FLASHINFER_HEAD_DIMS))
        return f"it has kernels for a head_dim of {known}, this model has {model.head_dim}"
    if gpu.missing_kernels and not gpu.can_compile:
        return (
            f"{len(gpu.missing_kernels)} of its kernels for {model.dtype} and head_dim {model.head_dim} are "
            "not compiled and there is no nvcc to do it (install the CUDA toolkit or flashinfer-jit-cache)"
        )
    return None


def _against_triton(model: ModelFacts) -> str | None:
    if model.head_dim > TRITON_MAX_HEAD_DIM:
        return f"the kernels go up to a head_dim of {TRITON_MAX_HEAD_DIM}, this model has {model.head_dim}"
    return None


def _named_but(wanted: AttentionBackend, reason: str) -> Refusal:
    return Refusal(
        f"--attention-backend {wanted} can't be used here: {reason}; auto takes the best one that can",
        "attention_backend",
    )

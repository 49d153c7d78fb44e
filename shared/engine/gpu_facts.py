"""Looks at a CUDA device and at what is installed for it; `backend.py` decides."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from phloem.kernels.hopper_ops.program import has_bindings
from phloem.shared.engine.backend import FLASHINFER_HEAD_DIMS, GpuFacts, ModelFacts, Refusal, refuse_device

FLASHINFER_VERSION = "0.6.14"  # its private entry points are called: see docs/adr/0005
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_gpu_facts(device: torch.device, model: ModelFacts) -> GpuFacts:
    """All that `choose_backend` asks for. Imports FlashInfer where it is installed in the right version."""
    problem = _flashinfer_problem()
    missing: tuple[str, ...] = ()
    if problem is None and model.dtype != "float32" and model.head_dim in FLASHINFER_HEAD_DIMS:
        missing, problem = _missing_kernels(device, model)
    return GpuFacts(
        name=torch.cuda.get_device_name(device),
        capability=torch.cuda.get_device_capability(device),
        torch_archs=tuple(torch.cuda.get_arch_list()),
        has_triton=importlib.util.find_spec("triton") is not None,
        flashinfer_problem=problem,
        missing_kernels=missing,
        can_compile=find_nvcc() is not None,
        has_cuda_bindings=has_bindings(),
    )


def device_refusal(device: torch.device) -> Refusal | None:
    """Why the engine can't use this CUDA device at all, or None."""
    return refuse_device(
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
        tuple(torch.cuda.get_arch_list()),
    )


def find_nvcc() -> Path | None:
    """Where FlashInfer would find the compiler."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        candidate = Path(home) / "bin" / "nvcc"
        return candidate if candidate.exists() else None
    found = shutil.which("nvcc")
    if found:
        return Path(found)
    usual = Path("/usr/local/cuda/bin/nvcc")
    return usual if usual.exists() else None


def _flashinfer_problem() -> str | None:
    try:
        found = version("flashinfer-python")
    except PackageNotFoundError:
        return "flashinfer-python is not installed (pip install phloem[gpu])"
    if found != FLASHINFER_VERSION:
        return f"flashinfer-python is {found}, and {FLASHINFER_VERSION} is needed (pip install phloem[gpu])"
    return None


def _missing_kernels(device: torch.device, model: ModelFacts) -> tuple[tuple[str, ...], str | None]:
    """The kernels, and why FlashInfer can't even be imported."""
    try:
        from phloem.kernels.flashinfer_ops.availability import missing_kernels
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        return (), f"flashinfer-python can't be imported ({type(error).__name__}: {reason})"
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    return missing_kernels(_DTYPES[model.dtype], model.head_dim, hopper=hopper), None


def compile_kernels(
    device: torch.device, model: ModelFacts, progress: Callable[[int, int], None]
) -> str | None:
    """Has FlashInfer compile what it lacks; why it failed, or None."""
    from phloem.kernels.flashinfer_ops.availability import compile_missing

    hopper = torch.cuda.get_device_capability(device)[0] == 9
    try:
        compile_missing(_DTYPES[model.dtype], model.head_dim, hopper=hopper, progress=progress)
    except (RuntimeError, OSError) as error:
        return str(error).strip().partition("\n")[0]
    return None

"""CUDA C++ kernels: compiled by NVRTC in this process, loaded and launched by the driver.

Both through `cuda.bindings`, which PyTorch's CUDA builds bring with NVRTC itself: nobody installs a compiler.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phloem.kernels.types import CudaError


class Launch(NamedTuple):
    """threads of a block; dynamic shared memory, bytes; cooperative: begins when all blocks fit at once;
    dependent: may be resident before the launch before it has ended, and waits for that itself; cluster:
    blocks that are side by side on multiprocessors that reach each other's shared memory."""

    num_blocks: int
    num_threads: int
    shared_bytes: int
    cooperative: bool = False
    dependent: bool = False
    cluster: int = 1


class Kernel:
    """One function of a compiled source, loaded on one device. Launches go to torch's current stream."""

    def __init__(self, image: bytes, name: str, device: torch.device, largest: Launch) -> None:
        """Raises CudaError where it can't be loaded, or the largest of its launches can't run there."""
        self._driver, self._device = bindings("driver"), device
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # torch has made its context current
            # Never unloaded: it must outlive every graph that holds its function.
            self._module = checked(self._driver.cuModuleLoadData(image))
            self._function = checked(self._driver.cuModuleGetFunction(self._module, name.encode()))
            limit = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            checked(self._driver.cuFuncSetAttribute(self._function, limit, largest.shared_bytes))
        if (room := self.room(largest)) < largest.num_blocks:
            raise CudaError(f"{name} needs {largest.num_blocks} blocks at once, and {room} fit")

    def room(self, launch: Launch) -> int:
        """Blocks that can be resident at once."""
        driver = self._driver
        with torch.cuda.device(self._device):
            if launch.cluster > 1:
                clusters = driver.cuOccupancyMaxActiveClusters(self._function, self._config(launch))
                return launch.cluster * int(checked(clusters))
            resident = checked(
                driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                    self._function, launch.num_threads, launch.shared_bytes
                )
            )
            return int(resident) * torch.cuda.get_device_properties(self._device).multi_processor_count

    def __call__(self, launch: Launch, arguments: tuple[tuple[Any, ...], tuple[Any, ...]]) -> None:
        """arguments: values and their ctypes; tensors are given by `data_ptr()`, structures have None."""
        config = self._config(launch)
        config.hStream = torch.cuda.current_stream(self._device).cuda_stream
        checked(self._driver.cuLaunchKernelEx(config, self._function, arguments, 0))

    def _config(self, launch: Launch) -> Any:
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.num_blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.num_threads, 1, 1
        config.sharedMemBytes = launch.shared_bytes
        config.attrs = self._attributes(launch)
        config.numAttrs = len(config.attrs)
        return config

    def _attributes(self, launch: Launch) -> list[Any]:
        ids, attributes = self._driver.CUlaunchAttributeID, []
        if launch.cooperative:
            attributes.append(self._driver.CUlaunchAttribute())
            attributes[-1].id = ids.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            attributes[-1].value.cooperative = 1
        if launch.dependent:
            attributes.append(self._driver.CUlaunchAttribute())
            attributes[-1].id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attributes[-1].value.programmaticStreamSerializationAllowed = 1
        if launch.cluster > 1:
            attributes.append(self._driver.CUlaunchAttribute())
            attributes[-1].id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            shape = attributes[-1].value.clusterDim
            shape.x, shape.y, shape.z = launch.cluster, 1, 1
        return attributes

    def read_global(self, name: str) -> bytes:
        """A variable of the source, once all that was launched is done."""
        torch.cuda.synchronize(self._device)
        place, size = checked(self._driver.cuModuleGetGlobal(self._module, name.encode()))
        data = bytearray(size)
        checked(self._driver.cuMemcpyDtoH(ctypes.addressof(ctypes.c_char.from_buffer(data)), place, size))
        return bytes(data)


_NOTHING = 'extern "C" __global__ void nothing() {}'


@functools.cache
def resident_blocks(device: torch.device, clusters: tuple[int, ...], shared_bytes: int) -> dict[int, int]:
    """How many blocks with so much dynamic shared memory can be resident at once, by the size of their
    clusters. Raises CudaError."""
    kernel = Kernel(compile_cuda(_NOTHING, {}, {}, "sm_90a"), "nothing", device, Launch(0, 32, shared_bytes))
    return {size: kernel.room(Launch(size, 32, shared_bytes, cluster=size)) for size in clusters}


def compile_file(
    name: str, headers: Sequence[str], defines: Mapping[str, object], made: Mapping[str, str] | None = None
) -> bytes:
    """The machine code of a source of this folder, for Hopper; `made` are headers that no file holds. As
    `compile_cuda`."""
    folder = files("phloem.kernels.hopper_ops")
    texts = {header: folder.joinpath(header).read_text() for header in headers} | dict(made or {})
    return compile_cuda(folder.joinpath(name).read_text(), texts, defines, "sm_90a")


def compile_cuda(
    source: str, headers: Mapping[str, str], defines: Mapping[str, object], architecture: str
) -> bytes:
    """The machine code. headers: what `#include` finds, by name; `architecture` as NVRTC spells it: `sm_90a`.

    What this process compiled before is returned at once. Raises CudaError with the compiler's log.
    """
    return _compiled(source, tuple(headers.items()), tuple(defines.items()), architecture)


@functools.cache
def _compiled(
    source: str,
    headers: tuple[tuple[str, str], ...],
    defines: tuple[tuple[str, object], ...],
    architecture: str,
) -> bytes:
    nvrtc = bindings("nvrtc")
    names, texts = [name.encode() for name, _ in headers], [text.encode() for _, text in headers]
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"phloem.cu", len(names), texts, names))
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    options += [f"-D{name}={value}".encode() for name, value in defines]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise CudaError(f"NVRTC: {log.decode(errors='replace').strip()}")
    image: bytes = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, image))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return image


def has_bindings() -> bool:
    """Whether `cuda.bindings` is installed and finds its libraries."""
    try:
        checked(bindings("nvrtc").nvrtcVersion())
    except (ImportError, AttributeError, RuntimeError, OSError):  # those of another CUDA, too
        return False
    return True


def bindings(name: str) -> Any:
    """A module of `cuda.bindings`."""
    return importlib.import_module(f"cuda.bindings.{name}")


def address(tensor: Tensor | None) -> int:
    """As a kernel gets it: 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def checked(result: tuple[Any, ...]) -> Any:
    """What a call returned besides its status."""
    status, *values = result
    if int(status) != 0:
        raise CudaError(f"{type(status).__name__}: {getattr(status, 'name', status)}")
    return values[0] if len(values) == 1 else tuple(values)

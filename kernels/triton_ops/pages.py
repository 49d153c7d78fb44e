"""KV pages to and from a flat staging buffer, with the digest of `reference/pages.py` in the same pass."""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.cuda_driver import CudaDriver
from phloem.kernels.reference.pages import COLUMN_STEP, ROW_STEP, ROW_WORDS
from phloem.kernels.types import PagedKV

_MAX_BLOCK_WORDS = 4096
_WORDS_PER_WARP = 256  # 64 bytes for each thread: four loads on their way
_CELLS = 2  # of a digest under way: the sum, and the programs that have added theirs
# Of the multiprocessors. NCCL's blocks want one for each, all of its registers: where no one is left, the
# next piece would begin to cross when this one is gathered or scattered.
_SHARE_OF_PROCESSORS = 0.75
# Programs that move pages faster than NVLink does, with some room. A move that need not be faster takes no
# more: with three times as many at work, what crosses meanwhile was a third slower (measured, 2 x H200).
_LINK_PROGRAMS = 32


@triton.jit(do_not_specialize=["num_pages", "num_planes"])  # one kernel for all: nobody waits for a compiler
def _move_kernel(
    planes,
    page_ids,
    staging,
    cells,
    told,
    num_pages,
    num_planes,
    page_words,
    row_words: tl.constexpr,
    row_step: tl.constexpr,
    column_step: tl.constexpr,
    gathers: tl.constexpr,
    block: tl.constexpr,
):
    """Each program moves its share of all planes of all pages, page by page. The last one to end stores the
    digest in `told`, and clears the cells for the next move."""
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    num_items = num_pages * num_planes
    first_item = (num_items.to(tl.int64) * program // num_programs).to(tl.int32)
    last_item = (num_items.to(tl.int64) * (program + 1) // num_programs).to(tl.int32)
    page = first_item // num_planes
    plane = first_item % num_planes
    page_id = tl.load(page_ids + page)  # over PCIe, so that the next one is asked for long before its turn
    base = tl.load(planes + plane)
    following_id = page_id
    total = tl.zeros([block], dtype=tl.int64)
    for item in range(first_item, last_item):
        page = item // num_planes
        plane = item % num_planes
        next_plane = (item + 1) % num_planes
        asks = (plane == 0) | (item == first_item)
        following_id = tl.where(
            asks, tl.load(page_ids + page + 1, mask=asks & (page + 1 < num_pages), other=-1), following_id
        )
        next_base = tl.load(planes + next_plane)
        # Planes lie as torch allocates them: 16 bytes are read and written at a time.
        pages = tl.multiple_of(base.to(tl.pointer_type(tl.int64)), 16) + page_id * page_words
        # Places in staging fit into 32 bits (16 GiB), which a GPU computes in one instruction.
        first = (plane * num_pages + page) * page_words
        staged = staging + first
        for start in range(0, page_words, block):
            word = start + tl.arange(0, block)
            inside = word < page_words
            if gathers:
                value = tl.load(pages + word, mask=inside, other=0)
                tl.store(staged + word, value, mask=inside)
            else:
                value = tl.load(staged + word, mask=inside, other=0)
                tl.store(pages + word, value, mask=inside & (page_id >= 0))
            place = first + word
            row_weight = ((place // row_words).to(tl.int64) * row_step) | 1
            column_weight = ((place % row_words).to(tl.int64) * column_step) | 1
            total += value * row_weight * column_weight
        page_id = tl.where(next_plane == 0, following_id, page_id)
        base = next_base
    tl.atomic_add(cells, tl.sum(total, axis=0), sem="relaxed")
    num_done = tl.atomic_add(cells + 1, 1, sem="acq_rel")
    if num_done == num_programs - 1:
        digest = tl.atomic_xchg(cells, 0, sem="relaxed")
        tl.store(cells + 1, 0)
        tl.store(told, digest)  # last: who sees it may give the cells to another move


class PageMover:
    """Moves pages of one KV pool on a CUDA device with as little work for the host as may be: the kernels are
    compiled here, and the driver launches them without a look at their arguments, which are addresses.

    For one thread."""

    def __init__(self, kv: PagedKV, addresses: Tensor, driver: CudaDriver) -> None:
        """`addresses` (`ops.plane_addresses`) are kept; `driver` is that of their device."""
        page_bytes = kv.k[0].stride(0) * kv.k[0].element_size()
        assert page_bytes % 8 == 0, "a page is whole 8-byte words"
        assert page_bytes > 8, "a page of one word would be another kernel"
        assert all(plane.data_ptr() % 16 == 0 for plane in (*kv.k, *kv.v)), (
            "the kernel reads 16 bytes at a time"
        )
        self._planes = addresses
        self._first_plane: int = addresses.data_ptr()
        self._most_programs = _most_programs(addresses.device)
        page_words = page_bytes // 8
        block, num_warps = _block(page_words)
        cells = self.new_cells()
        common = (addresses, cells, cells, cells, cells, 1, 1, page_words, ROW_WORDS, ROW_STEP, COLUMN_STEP)
        # Any: triton does not type its kernels.
        gather: Any = _move_kernel.warmup(*common, True, block, grid=(1,), num_warps=num_warps)
        scatter: Any = _move_kernel.warmup(*common, False, block, grid=(1,), num_warps=num_warps)
        self._page_words = page_words
        self._gather, self._scatter = _Launch(gather, driver), _Launch(scatter, driver)

    def new_cells(self) -> Tensor:
        """Cleared cells for the digest of one move at a time."""
        return torch.zeros(_CELLS, dtype=torch.int64, device=self._planes.device)

    def new_arguments(self, page_ids: int, cells: int, told: int) -> MoveArguments:
        """For one move at a time, of addresses that are multiples of 16: of int64 page ids and of the int64
        where the digest will be when all has moved, both maybe in pinned memory, and of cells of its own."""
        values = _Arguments(page_words=self._page_words, page_ids=page_ids, cells=cells, told=told)
        return MoveArguments(values, values.addresses())

    def move(
        self,
        gathers: bool,
        arguments: MoveArguments,
        num_pages: int,
        layers: tuple[int, int],
        staging: int,
        stream: int,
        beside: float = 0.0,
    ) -> None:
        """Launches, in `stream`, what `gather_pages` or `scatter_pages` do with the first `num_pages` of the
        arguments' page ids and the memory at `staging`, a multiple of 16. `beside`: what crosses the link
        meanwhile, in parts of what is moved (`num_programs`)."""
        layer_start, layer_end = layers
        values = arguments.values
        num_planes = 2 * (layer_end - layer_start)
        values.planes, values.staging = self._first_plane + 16 * layer_start, staging
        values.num_pages, values.num_planes = num_pages, num_planes
        programs = min(num_programs(self._most_programs, beside), num_pages * num_planes)
        (self._gather if gathers else self._scatter)(programs, stream, arguments.addresses)


class MoveArguments(NamedTuple):
    """What is written to `values` before a launch is what the kernel gets; the launch reads it at once."""

    values: _Arguments
    addresses: ctypes.Array[ctypes.c_void_p]  # of each value


class _Arguments(ctypes.Structure):
    """Of `_move_kernel` as compiled, constants left out; Triton adds two addresses of scratch memory, which
    the kernel has no use for."""

    _fields_ = (
        ("planes", ctypes.c_void_p),
        ("page_ids", ctypes.c_void_p),
        ("staging", ctypes.c_void_p),
        ("cells", ctypes.c_void_p),
        ("told", ctypes.c_void_p),
        ("num_pages", ctypes.c_int32),
        ("num_planes", ctypes.c_int32),
        ("page_words", ctypes.c_int32),
        ("global_scratch", ctypes.c_void_p),
        ("profile_scratch", ctypes.c_void_p),
    )

    def addresses(self) -> ctypes.Array[ctypes.c_void_p]:
        """As the driver wants them. They are this structure's, whose values may change."""
        start = ctypes.addressof(self)
        offsets = [getattr(type(self), name).offset for name, _ in self._fields_]
        return (ctypes.c_void_p * len(offsets))(*[start + offset for offset in offsets])


class _Launch:
    """Of one compiled kernel."""

    def __init__(self, kernel: Any, driver: CudaDriver) -> None:
        """`kernel` is Triton's, which does not type it. Its module is loaded here."""
        assert not kernel.metadata.global_scratch_size, "the kernel wants no scratch memory"
        kernel[(1, 1, 1)]  # loads it
        self._function: int = kernel.function
        self._num_threads = 32 * kernel.metadata.num_warps
        self._shared_bytes: int = kernel.metadata.shared
        self._driver = driver

    def __call__(self, num_programs: int, stream: int, arguments: ctypes.Array[ctypes.c_void_p]) -> None:
        self._driver.launch(
            self._function, num_programs, self._num_threads, self._shared_bytes, stream, arguments
        )


def gather_pages(kv: PagedKV, page_ids: Tensor, layer_start: int, layer_end: int, out: Tensor) -> Tensor:
    """See `ops.gather_pages`; the digest stays on the device. The upload of the planes' addresses is waited
    for, which `PageMover` has done before."""
    return _move(kv, page_ids, layer_start, layer_end, out, gathers=True)


def scatter_pages(kv: PagedKV, page_ids: Tensor, layer_start: int, layer_end: int, src: Tensor) -> Tensor:
    """See `ops.scatter_pages` and `gather_pages`."""
    return _move(kv, page_ids, layer_start, layer_end, src, gathers=False)


def _move(
    kv: PagedKV, page_ids: Tensor, layer_start: int, layer_end: int, staging: Tensor, *, gathers: bool
) -> Tensor:
    cells = torch.zeros(_CELLS + 1, dtype=torch.int64, device=staging.device)
    told = cells[_CELLS:]
    num_planes = 2 * (layer_end - layer_start)
    if not num_planes or not page_ids.numel():
        return told
    page_bytes = kv.k[0].stride(0) * kv.k[0].element_size()
    assert page_bytes % 8 == 0, "a page is whole 8-byte words"
    layers = range(layer_start, layer_end)
    on_host = [plane.data_ptr() for layer in layers for plane in (kv.k[layer], kv.v[layer])]
    page_words = page_bytes // 8
    block, num_warps = _block(page_words)
    _move_kernel[(min(_most_programs(staging.device), page_ids.numel() * num_planes),)](
        torch.tensor(on_host, dtype=torch.int64, device=staging.device),
        page_ids,
        staging[: staging.numel() // 8 * 8].view(torch.int64),
        cells,
        told,
        page_ids.numel(),
        num_planes,
        page_words,
        row_words=ROW_WORDS,
        row_step=ROW_STEP,
        column_step=COLUMN_STEP,
        gathers=gathers,
        block=block,
        num_warps=num_warps,
    )
    return told


def num_programs(most: int, beside: float) -> int:
    """For a move that shall be over when `beside` times its bytes have crossed the link; 0: as soon as may
    be. Never fewer than keep up with the link: the next move waits in the same stream."""
    return most if not beside else min(most, math.ceil(_LINK_PROGRAMS / min(beside, 1.0)))


def _block(page_words: int) -> tuple[int, int]:
    """Words at a time, and warps."""
    block = min(_MAX_BLOCK_WORDS, triton.next_power_of_2(page_words))
    return block, max(1, min(16, block // _WORDS_PER_WARP))


def _most_programs(device: torch.device) -> int:
    """How many work at a time, each with a multiprocessor of its own."""
    if device.type != "cuda":
        return 4  # of an interpreter
    return max(1, int(_SHARE_OF_PROCESSORS * torch.cuda.get_device_properties(device).multi_processor_count))

"""What a step takes, and what is said when it, its graphs or its pages do not fit: advice that works."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from phloem.kernels.triton_ops import sampling
from phloem.shared.engine.memory import MARGIN_BYTES, DeviceMemory
from phloem.shared.engine.step_advice import (
    Rehearsed,
    graphs_too_large,
    rehearsal_not_allocated,
    step_too_large,
)
from phloem.shared.engine.step_memory import (
    LEAST_CHUNK,
    WORKSPACE_BYTES,
    StepSizes,
    smaller_step,
    smallest_step,
    step_cost,
)
from phloem.shared.model_store.model_config import load_model_config

GB = 10**9
H100 = DeviceMemory("NVIDIA H100", 85 * GB, 68 * GB, 16 * GB)
LLAMA = load_model_config(Path(__file__).parents[2] / "benchmarks/models/llama-3.1-8b")
COST = step_cost(LLAMA, 2)
DEFAULTS = StepSizes(chunk_tokens=8192, running=256, graph_rows=256)
POOL = Rehearsed(16 * 131_072, 16, 131_072)


def obeyed(message: str, sizes: StepSizes) -> StepSizes:
    """The sizes that the sentence advises, none of them larger."""
    chunk = re.search(r"--chunked-prefill-size to (\d+)", message)
    running = re.search(r"--max-running-requests to (\d+)", message)
    assert chunk or running, message
    advised = sizes._replace(
        chunk_tokens=int(chunk[1]) if chunk else sizes.chunk_tokens,
        running=int(running[1]) if running else sizes.running,
    )
    assert (
        advised != sizes and advised.chunk_tokens <= sizes.chunk_tokens and advised.running <= sizes.running
    )
    return advised


# -- costs --------------------------------------------------------------------------------------------------


def test_the_estimate_grows_with_everything_it_counts() -> None:
    sizes = StepSizes(100, 10, 0)
    small = COST.of(sizes)
    assert (
        small
        < COST.of(sizes._replace(chunk_tokens=200))
        < step_cost(LLAMA, 4).of(sizes._replace(chunk_tokens=200))
    )
    assert small < COST.of(sizes._replace(running=20))
    wider = msgspec.structs.replace(LLAMA, vocab_size=2 * LLAMA.vocab_size)
    assert small < step_cost(wider, 2).of(sizes)


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that live at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.most = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in self._storages and all(
                address != other.untyped_storage().data_ptr() for other in args if isinstance(other, Tensor)
            ):
                self._storages.add(address)
                self.live += storage.nbytes()
                self.most = max(self.most, self.live)
                weakref.finalize(tensor, self._drop, address, storage.nbytes())
        return out

    def _drop(self, address: int, num_bytes: int) -> None:
        self._storages.discard(address)
        self.live -= num_bytes


def test_the_estimate_counts_what_sampling_with_filters_holds() -> None:
    rows, vocab = 4, 32_768
    logits = torch.randn(rows, vocab)
    ones = torch.ones(rows)
    with Held() as held:
        thresholds = sampling._thresholds(
            logits, ones, ones, torch.full((rows,), 50), 0.9 * ones, 0.01 * ones
        )
    assert thresholds.shape == (rows,)
    held_bytes = (held.most + logits.nbytes) / logits.numel()
    assert held_bytes == pytest.approx(32, abs=1), "logits, sorted ones, masses, their sums and quotients"
    model = msgspec.structs.replace(LLAMA, vocab_size=vocab)
    # The sort of a CUDA device takes more than one of a CPU, whose scratch is no tensor.
    assert step_cost(model, 0).per_row / vocab >= held_bytes


# -- smaller steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0.1, 0.3, 0.6, 1.0, 2.0])
def test_the_first_smaller_step_that_fits_is_found(room: float) -> None:
    found = smaller_step(DEFAULTS, COST, lambda sizes: COST.of(sizes) <= room * GB)
    assert found is not None and COST.of(found) <= room * GB
    for larger in (
        found._replace(chunk_tokens=2 * found.chunk_tokens),
        found._replace(running=2 * found.running),
    ):
        assert larger.chunk_tokens > 8192 or larger.running > 256 or COST.of(larger) > room * GB / 2
    assert found.graph_rows <= found.running


def test_where_none_fits_none_is_found() -> None:
    tried: list[StepSizes] = []

    def never(sizes: StepSizes) -> bool:
        tried.append(sizes)
        return False

    assert smaller_step(DEFAULTS, COST, never) is None
    assert tried[-1] == smallest_step(DEFAULTS) == StepSizes(LEAST_CHUNK, 1, 1)
    assert DEFAULTS not in tried, "what did not fit once is not tried again"
    assert smaller_step(StepSizes(16, 1, 0), COST, lambda sizes: True) is None


# -- sentences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free", [int(0.1 * GB), int(0.3 * GB), int(0.6 * GB), GB])
def test_step_that_is_too_large_names_one_that_fits(free: int) -> None:
    error = step_too_large(DEFAULTS, COST, H100._replace(free=free), rehearsed=False)
    message = str(error)
    assert (error.code, error.info.param) == ("out_of_memory", "chunked_prefill_size")
    assert message.startswith("a step of 8192 tokens and 256 requests, about 2.8 GB, does not fit")
    assert COST.of(obeyed(message, DEFAULTS)) <= free
    assert "--mem-fraction-static" not in message, "the rehearsal's pool is as small as it gets"


def test_step_that_was_rehearsed_leaves_the_pool_to_be_lowered() -> None:
    memory = H100._replace(free=GB)
    assert "lower --mem-fraction-static, or lower --" in str(
        step_too_large(DEFAULTS, COST, memory, rehearsed=True)
    )
    nothing = str(step_too_large(DEFAULTS, COST, memory._replace(free=0), rehearsed=True))
    assert (
        "even --chunked-prefill-size 64 --max-running-requests 1 would need 15.3 MB: lower "
        "--mem-fraction-static, or stop what else uses the device (69.0 GB)" in nothing
    )


@pytest.mark.parametrize("free", [GB, int(1.6 * GB)])
def test_graphs_that_are_too_large_name_a_batch_that_fits(free: int) -> None:
    error = graphs_too_large(DEFAULTS, COST, H100._replace(free=free), rehearsed=False)
    message = str(error)
    assert error.info.param == "cuda_graph_max_bs"
    assert f"CUDA graphs for up to 256 requests do not fit ({free / GB:.1f} GB of NVIDIA H100's" in message
    rows = int(message.split("--cuda-graph-max-bs ")[1].split(",")[0])
    assert 1 <= rows < 256 and rows * COST.per_graph_row + WORKSPACE_BYTES <= free
    assert "--disable-cuda-graph" in message and "--mem-fraction-static" not in message


def test_graphs_of_which_none_fits_are_to_be_disabled() -> None:
    message = str(graphs_too_large(DEFAULTS, COST, H100._replace(free=GB // 5), rehearsed=True))
    assert "--cuda-graph-max-bs" not in message
    assert "lower --mem-fraction-static, or give --disable-cuda-graph, or stop what else" in message


@pytest.mark.parametrize("free", [2 * GB, 3 * GB, 4 * GB])
@pytest.mark.parametrize("sizes", [StepSizes(65_536, 256, 256), StepSizes(8192, 4096, 256)])
def test_pages_of_the_rehearsal_are_lowered_by_the_flags_that_decide_them(
    sizes: StepSizes, free: int
) -> None:
    """By those of the step: `--mem-fraction-static` and `--max-total-tokens` have no say in them."""
    error = rehearsal_not_allocated(POOL, H100._replace(free=free), sizes, COST, channels=GB // 2)
    message = str(error)
    assert (error.code, error.info.param) == ("out_of_memory", "chunked_prefill_size")
    assert (
        f"KV pages for a step of {sizes.chunk_tokens} tokens and {sizes.running} requests, 8.6 GB" in message
    )
    assert "--mem-fraction-static" not in message and "--max-total-tokens" not in message
    advised = obeyed(message, sizes)
    beside = COST.of(advised) + WORKSPACE_BYTES + GB // 2 + MARGIN_BYTES
    assert POOL.bytes_of(advised) + beside <= free


def test_where_no_rehearsal_fits_no_flag_is_promised_to_help() -> None:
    """As beside another process that leaves 0.9 GB: the least that an engine keeps free is more than that."""
    message = str(rehearsal_not_allocated(POOL, H100._replace(free=int(0.9 * GB)), DEFAULTS, COST, GB))
    assert message == (
        "the weights fit, but KV pages for a step of 8192 tokens and 256 requests, 1.1 GB, could not be "
        "allocated: 0.9 GB of NVIDIA H100's 85.0 GB were free; even --chunked-prefill-size 64 "
        "--max-running-requests 1 would need 2.2 GB: stop what else uses the device (68.1 GB), or use one "
        "with more memory"
    )

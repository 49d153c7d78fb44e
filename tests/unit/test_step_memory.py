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

from phloem.kernels.triton_ops.thresholds import thresholds
from phloem.shared.engine.memory import DeviceMemory
from phloem.shared.engine.step_advice import (
    Rehearsal,
    graphs_of,
    graphs_too_large,
    pages_of,
    rehearsal_failed,
    step_of,
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
# As if a row took much: what is advised is the chunk, the rows or both.
COST = step_cost(LLAMA, 2)._replace(per_row=54 * LLAMA.vocab_size)
DEFAULTS = StepSizes(chunk_tokens=8192, running=256, graph_rows=256)


def rehearsal_of(sizes: StepSizes) -> Rehearsal:
    return Rehearsal(sizes, COST, 16 * 131_072, 16, 131_072, channels=GB // 2, one_channel=GB // 2)


def obeyed(message: str, sizes: StepSizes) -> StepSizes:
    """The sizes that the sentence advises, none of them larger."""
    chunk = re.search(r"--chunked-prefill-size to (\d+)", message)
    running = re.search(r"--max-running-requests to (\d+)", message)
    assert chunk or running, message
    rows = int(running[1]) if running else sizes.running
    advised = StepSizes(int(chunk[1]) if chunk else sizes.chunk_tokens, rows, min(sizes.graph_rows, rows))
    assert (
        advised != sizes and advised.chunk_tokens <= sizes.chunk_tokens and advised.running <= sizes.running
    )
    return advised


# -- costs --------------------------------------------------------------------------------------------------


def test_the_estimate_grows_with_everything_it_counts() -> None:
    sizes, cost = StepSizes(100, 10, 0), step_cost(LLAMA, 2)
    small = cost.of(sizes)
    assert (
        small
        < cost.of(sizes._replace(chunk_tokens=200))
        < step_cost(LLAMA, 4).of(sizes._replace(chunk_tokens=200))
    )
    assert small < cost.of(sizes._replace(running=20))
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only where no GPU is")
def test_the_estimate_counts_what_sampling_with_filters_holds() -> None:
    rows, vocab = 4, 32_768
    logits = torch.randn(rows, vocab)
    ones = torch.ones(rows)
    with Held() as held:
        found = thresholds(
            logits, logits[:, :16].clone(), ones, torch.full((rows,), 50), 0.9 * ones, 0.01 * ones
        )
    assert found.shape == (rows,)
    model = msgspec.structs.replace(LLAMA, vocab_size=vocab)
    beside_logits = step_cost(model, 0).per_row - logits.nbytes / rows
    assert 0.9 * beside_logits <= held.most / rows <= beside_logits


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
    error = step_too_large(DEFAULTS, COST, H100._replace(free=free))
    message = str(error)
    assert (error.code, error.info.param) == ("out_of_memory", "chunked_prefill_size")
    assert message.startswith("a step of 8192 tokens and 256 requests, about 2.8 GB, does not fit")
    assert "lower --mem-fraction-static, or lower --" in message, "it was rehearsed beside a smaller pool"
    assert COST.of(obeyed(message, DEFAULTS)) <= free


def test_step_of_which_no_part_fits_leaves_the_pool_to_be_lowered() -> None:
    message = str(step_too_large(DEFAULTS, COST, H100._replace(free=0)))
    assert message.endswith("lower --mem-fraction-static, or stop what else uses the device")


@pytest.mark.parametrize("free", [GB * 7 // 10, GB])
def test_graphs_that_are_too_large_name_a_batch_that_fits(free: int) -> None:
    error = graphs_too_large(DEFAULTS, COST, H100._replace(free=free))
    message = str(error)
    assert error.info.param == "cuda_graph_max_bs"
    assert f"CUDA graphs for up to 256 requests do not fit ({free / GB:.1f} GB of NVIDIA H100's" in message
    rows = int(message.split("--cuda-graph-max-bs ")[1].split(",")[0])
    assert 1 <= rows < 256 and rows * COST.per_graph_row + WORKSPACE_BYTES <= free
    assert "--disable-cuda-graph" in message


def test_graphs_of_which_none_fits_are_to_be_disabled() -> None:
    message = str(graphs_too_large(DEFAULTS, COST, H100._replace(free=GB // 5)))
    assert "--cuda-graph-max-bs" not in message
    assert "lower --mem-fraction-static, or give --disable-cuda-graph, or stop what else" in message


def test_each_part_of_a_rehearsal_is_named() -> None:
    rehearsal = rehearsal_of(DEFAULTS)
    assert pages_of(rehearsal) == "KV pages for a step of 8192 tokens and 256 requests, 1.1 GB,"
    assert graphs_of(DEFAULTS) == "CUDA graphs for up to 256 requests"
    assert step_of(DEFAULTS, COST) == "a step of 8192 tokens and 256 requests, about 2.8 GB,"


@pytest.mark.parametrize("free", [2 * GB, 3 * GB, 4 * GB])
@pytest.mark.parametrize("sizes", [StepSizes(65_536, 256, 256), StepSizes(8192, 4096, 256)])
def test_what_a_rehearsal_lacks_is_lowered_by_the_flags_that_decide_it(sizes: StepSizes, free: int) -> None:
    """By those of the step: `--mem-fraction-static` and `--max-total-tokens` have no say in it."""
    rehearsal = rehearsal_of(sizes)
    error = rehearsal_failed(pages_of(rehearsal), rehearsal, H100._replace(free=free))
    message = str(error)
    assert (error.code, error.info.param) == ("out_of_memory", "chunked_prefill_size")
    assert (
        f"KV pages for a step of {sizes.chunk_tokens} tokens and {sizes.running} requests, 8.6 GB" in message
    )
    assert "--mem-fraction-static" not in message and "--max-total-tokens" not in message
    assert rehearsal.need(obeyed(message, sizes), rehearsal.channels) <= free


def test_where_channels_are_in_the_way_of_a_rehearsal_fewer_peers_are_advised() -> None:
    rehearsal = rehearsal_of(DEFAULTS)._replace(channels=3 * GB)
    message = str(rehearsal_failed("X", rehearsal, H100._replace(free=3 * GB)))
    assert "and --transfer-peers to 1, or stop what else uses the device" in message
    assert rehearsal.need(obeyed(message, DEFAULTS), rehearsal.one_channel) <= 3 * GB


def test_where_no_rehearsal_fits_no_flag_is_promised_to_help() -> None:
    """As beside another process that leaves 0.9 GB: the least that an engine keeps free is more than that."""
    rehearsal = rehearsal_of(DEFAULTS)
    error = rehearsal_failed(pages_of(rehearsal), rehearsal, H100._replace(free=int(0.9 * GB)))
    assert error.info.param == "device"
    assert str(error) == (
        "the weights fit, but KV pages for a step of 8192 tokens and 256 requests, 1.1 GB, did not: beside "
        "them 0.9 GB of NVIDIA H100's 85.0 GB were free; even --chunked-prefill-size 64 "
        "--max-running-requests 1 --transfer-peers 1 would need 1.7 GB: stop what else uses the device "
        "(68.1 GB), or use one with more memory"
    )

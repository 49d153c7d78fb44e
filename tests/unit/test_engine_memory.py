"""What fits into a device's memory and what is said when something does not: figures in, sentences out."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from phloem.shared.engine.config import EngineOptions
from phloem.shared.engine.memory import (
    MARGIN_BYTES,
    DeviceMemory,
    PoolWish,
    StepSizes,
    check_weights,
    gb,
    plan_pool,
    pool_not_allocated,
    staging_not_allocated,
    step_bytes,
    step_too_large,
)
from phloem.shared.engine.sizing import channels_reserve, staging_reserve, transfer_peers
from phloem.shared.errors import PhloemError
from phloem.shared.model_store.model_config import load_model_config
from phloem.shared.transfer.config import NCCL_BYTES_PER_CTA

GB = 10**9
PAGE = 16 * 131_072  # Llama-3.1-8B in bfloat16
WEIGHTS = 16_060_000_000
H100 = DeviceMemory("NVIDIA H100", 85 * GB, 68 * GB, WEIGHTS)  # with the weights loaded
WISH = PoolWish(PAGE, 16, 131_072, 0.85, 0)
LLAMA = load_model_config(Path(__file__).parents[2] / "benchmarks/models/llama-3.1-8b")


def told(caught: pytest.ExceptionInfo[PhloemError], param: str) -> str:
    """The one sentence; `param` is the flag it blames."""
    assert (caught.value.code, caught.value.info.param) == ("out_of_memory", param)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [(85 * GB, "85.0 GB"), (2_097_152, "2.1 MB"), (60_000_000, "0.1 GB"), (-5, "0.0 MB")],
)
def test_bytes_for_people(num_bytes: int, shown: str) -> None:
    assert gb(num_bytes) == shown


# -- weights ------------------------------------------------------------------------------------------------


def test_weights_that_fit_are_not_mentioned() -> None:
    check_weights(WEIGHTS, "bfloat16", DeviceMemory("GPU", 24 * GB, WEIGHTS, 0))


def test_weights_larger_than_the_device() -> None:
    with pytest.raises(PhloemError) as caught:
        check_weights(WEIGHTS, "bfloat16", DeviceMemory("NVIDIA A10", 12 * GB, 11 * GB, 0))
    assert told(caught, "model_path") == (
        "the weights need 16.1 GB in bfloat16, but NVIDIA A10 has 12.0 GB in all: use a device with more "
        "memory or a smaller model"
    )


def test_weights_that_would_fit_were_it_not_for_others() -> None:
    with pytest.raises(PhloemError) as caught:
        check_weights(2 * WEIGHTS, "float32", DeviceMemory("NVIDIA H100", 85 * GB, 12 * GB, GB))
    assert told(caught, "device") == (
        "the weights need 32.1 GB in float32, but of NVIDIA H100's 85.0 GB only 12.0 GB are free (other "
        "processes hold 72.0 GB): stop them, or use another device, --dtype bfloat16 (16.1 GB) or a smaller "
        "model"
    )


# -- KV pages -----------------------------------------------------------------------------------------------


def test_pool_takes_the_static_share_less_the_weights() -> None:
    plan = plan_pool(WISH, H100, overhead=3 * GB)
    assert plan.note is None
    used = WEIGHTS + (plan.num_pages + 1) * PAGE  # with the scratch page
    assert used <= 0.85 * 85 * GB < used + PAGE


def test_another_process_does_not_lower_the_share_while_there_is_room() -> None:
    """Two workers of one GPU: each takes its share, whoever came first."""
    wish = WISH._replace(fraction=0.4)
    alone = plan_pool(wish, H100, overhead=3 * GB)
    assert plan_pool(wish, H100._replace(free=30 * GB), overhead=3 * GB) == alone


def test_fraction_too_high_takes_what_graphs_and_steps_leave_and_says_so() -> None:
    plan = plan_pool(WISH._replace(fraction=0.98), H100, overhead=6 * GB)
    room = 68 * GB - 6 * GB - MARGIN_BYTES
    assert (plan.num_pages + 1) * PAGE <= room < (plan.num_pages + 2) * PAGE
    assert plan.note == (
        "--mem-fraction-static 0.98 would give KV pages 67.2 GB, but CUDA graphs, the largest step and "
        "staging need 6.0 GB: the pool takes 61.5 GB"
    )


def test_fraction_too_low_is_refused_with_one_that_holds_a_long_request() -> None:
    with pytest.raises(PhloemError) as caught:
        plan_pool(WISH._replace(fraction=0.15), H100, overhead=3 * GB)
    assert told(caught, "mem_fraction_static") == (
        "--mem-fraction-static 0.15 allows weights and KV pages 12.8 GB of NVIDIA H100's 85.0 GB; the "
        "weights alone take 16.1 GB, and a page of 16 tokens 2.1 MB: raise it to 0.21, which holds 13632 "
        "tokens, or use a smaller model"
    )
    suggested = plan_pool(WISH._replace(fraction=0.21), H100, overhead=3 * GB)
    assert suggested.num_pages * 16 == 13_632


def test_where_no_share_would_do_a_size_is_suggested() -> None:
    full = DeviceMemory("GPU", 800 * GB, 5 * GB, 795 * GB)
    with pytest.raises(PhloemError, match=r"give --max-total-tokens \d+, or use a smaller model") as caught:
        plan_pool(WISH._replace(fraction=0.5), full, overhead=GB)
    tokens = int(str(caught.value).split("--max-total-tokens ")[1].split(",")[0])
    plan = plan_pool(WISH._replace(fraction=0.5, max_total_tokens=tokens), full, overhead=GB)
    assert plan.num_pages == tokens // 16


def test_no_room_beside_graphs_and_steps_names_what_makes_them_smaller() -> None:
    with pytest.raises(PhloemError) as caught:
        plan_pool(WISH, H100._replace(free=3 * GB), overhead=3 * GB)
    message = told(caught, "chunked_prefill_size")
    assert (
        "of the 3.0 GB free beside them on NVIDIA H100 CUDA graphs, the largest step and staging take 3.5 GB"
        in message
    )
    assert "--max-running-requests, --cuda-graph-max-bs or --transfer-peers" in message


def test_max_total_tokens_is_taken_whatever_the_fraction_says() -> None:
    wish = WISH._replace(max_total_tokens=100_000, fraction=0.01)
    assert plan_pool(wish, H100, overhead=3 * GB).num_pages == 6250


def test_max_total_tokens_that_do_not_fit_are_refused_with_the_number_that_does() -> None:
    with pytest.raises(PhloemError) as caught:
        plan_pool(WISH._replace(max_total_tokens=1_000_000), H100, overhead=3 * GB)
    message = told(caught, "max_total_tokens")
    assert message.startswith("--max-total-tokens 1000000 needs 131.1 GB of KV pages")
    most = int(message.rpartition("lower it to ")[2])
    assert plan_pool(WISH._replace(max_total_tokens=most), H100, overhead=3 * GB).num_pages == most // 16
    with pytest.raises(PhloemError):
        plan_pool(WISH._replace(max_total_tokens=most + 16), H100, overhead=3 * GB)


def test_max_total_tokens_below_two_pages_is_refused() -> None:
    with pytest.raises(PhloemError) as caught:
        plan_pool(WISH._replace(max_total_tokens=31), H100, overhead=0)
    assert "give at least 32" in told(caught, "max_total_tokens")


def test_pool_that_was_taken_from_under_us_names_one_that_fits() -> None:
    error = pool_not_allocated(30_000, PAGE, 16, H100._replace(free=10 * GB))
    assert error.code == "out_of_memory"
    assert "KV pages for 480000 tokens, 62.9 GB" in str(error)
    tokens = int(str(error).split("--max-total-tokens ")[1].split(",")[0])
    assert (tokens // 16 + 1) * PAGE + MARGIN_BYTES <= 10 * GB < (tokens // 16 + 2) * PAGE + MARGIN_BYTES


# -- steps and graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("free", [int(0.3 * GB), int(0.6 * GB), GB])
def test_step_that_is_too_large_names_a_chunk_that_fits(free: int) -> None:
    sizes = StepSizes(chunk_tokens=8192, running=256, graph_rows=256)
    error = step_too_large(LLAMA, 2, sizes, H100._replace(free=free), capturing=False)
    message = str(error)
    assert error.info.param == "chunked_prefill_size"
    assert message.startswith("a step of 8192 tokens and 256 requests, about 1.4 GB, does not fit")
    tokens = int(message.split("--chunked-prefill-size to ")[1].split(",")[0])
    assert tokens < 8192 and step_bytes(LLAMA, 2, tokens, min(tokens, 256)) <= free
    assert tokens == 4096 or step_bytes(LLAMA, 2, 2 * tokens, 256) > free


def test_graphs_that_are_too_large_name_a_batch_that_fits() -> None:
    sizes = StepSizes(chunk_tokens=8192, running=256, graph_rows=256)
    error = step_too_large(LLAMA, 2, sizes, H100._replace(free=GB // 5), capturing=True)
    assert error.info.param == "cuda_graph_max_bs"
    assert "CUDA graphs for up to 256 requests do not fit (0.2 GB of NVIDIA H100's 85.0 GB were free)" in str(
        error
    )
    rows = int(str(error).split("--cuda-graph-max-bs to ")[1].split(",")[0])
    assert 1 <= rows < 256 and "--disable-cuda-graph" in str(error)


def test_the_estimate_grows_with_everything_it_counts() -> None:
    small = step_bytes(LLAMA, 2, 100, 10)
    assert small < step_bytes(LLAMA, 2, 200, 10) < step_bytes(LLAMA, 4, 200, 10)
    assert small < step_bytes(LLAMA, 2, 100, 20)
    wider = msgspec.structs.replace(LLAMA, vocab_size=2 * LLAMA.vocab_size)
    assert small < step_bytes(wider, 2, 100, 10)


def test_staging_is_set_aside_for_the_peers_that_a_role_has() -> None:
    options = EngineOptions(staging_bytes=1 << 20, staging_slots=4)
    assert [transfer_peers(options, role) for role in ("prefill", "decode", "unified")] == [8, 8, 2]
    few = msgspec.structs.replace(options, transfer_peers=3)
    assert [transfer_peers(few, role) for role in ("prefill", "unified")] == [3, 3]
    assert staging_reserve(few) == (3 - 1 + 4) << 20
    narrow = msgspec.structs.replace(few, transfer_max_ctas=8)
    for each, ctas in ((few, 32), (narrow, 16)):
        assert channels_reserve(each) - staging_reserve(each) == 3 * ctas * NCCL_BYTES_PER_CTA
    assert 150 << 20 < (channels_reserve(few) - staging_reserve(few)) / 3 < 256 << 20, "as measured"
    message = str(staging_not_allocated(staging_reserve(few) << 10, H100))
    assert message.startswith("6.4 GB of staging memory for KV transfer could not be allocated: 68.0 GB of")
    assert "lower --transfer-peers or --staging-bytes" in message

"""What fits into a device's memory and what is said when something does not: figures in, sentences out."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from phloem.shared.engine.config import EngineOptions
from phloem.shared.engine.memory import (
    MARGIN_BYTES,
    BesidePool,
    DeviceMemory,
    PoolWish,
    check_weights,
    gb,
    plan_pool,
    pool_not_allocated,
    staging_not_allocated,
)
from phloem.shared.engine.sizing import channels_reserve, staging_reserve, transfer_peers
from phloem.shared.engine.step_memory import StepSizes, step_cost
from phloem.shared.errors import PhloemError
from phloem.shared.model_store.model_config import load_model_config
from phloem.shared.transfer.config import NCCL_BYTES_PER_CTA

GB = 10**9
PAGE = 16 * 131_072  # Llama-3.1-8B in bfloat16
WEIGHTS = 16_060_000_000
H100 = DeviceMemory("NVIDIA H100", 85 * GB, 68 * GB, WEIGHTS)  # with the weights loaded
WISH = PoolWish(PAGE, 16, 131_072, 0.85, 0)
LLAMA = load_model_config(Path(__file__).parents[2] / "benchmarks/models/llama-3.1-8b")

# As if a row took much: what is advised is the chunk, the rows or both.
COST = step_cost(LLAMA, 2)._replace(per_row=54 * LLAMA.vocab_size)
DEFAULTS = StepSizes(chunk_tokens=8192, running=256, graph_rows=256)


def beside(measured: int, channels: int = 0, one_channel: int = 0, sizes: StepSizes = DEFAULTS) -> BesidePool:
    return BesidePool(measured, channels, one_channel, sizes, COST)


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
    plan = plan_pool(WISH, H100, beside(3 * GB))
    assert plan.note is None
    used = WEIGHTS + (plan.num_pages + 1) * PAGE  # with the scratch page
    assert used <= 0.85 * 85 * GB < used + PAGE


def test_another_process_does_not_lower_the_share_while_there_is_room() -> None:
    """Two workers of one GPU: each takes its share, whoever came first."""
    wish = WISH._replace(fraction=0.4)
    alone = plan_pool(wish, H100, beside(3 * GB))
    assert plan_pool(wish, H100._replace(free=30 * GB), beside(3 * GB)) == alone


def test_fraction_too_high_takes_what_graphs_and_steps_leave_and_says_so() -> None:
    plan = plan_pool(WISH._replace(fraction=0.98), H100, beside(6 * GB))
    room = 68 * GB - 6 * GB - MARGIN_BYTES
    assert (plan.num_pages + 1) * PAGE <= room < (plan.num_pages + 2) * PAGE
    assert plan.note == (
        "--mem-fraction-static 0.98 would give KV pages 67.2 GB, but CUDA graphs, the largest step and "
        "staging need 6.0 GB: the pool takes 61.5 GB"
    )


def test_fraction_too_low_is_refused_with_one_that_holds_a_long_request() -> None:
    with pytest.raises(PhloemError) as caught:
        plan_pool(WISH._replace(fraction=0.15), H100, beside(3 * GB))
    assert told(caught, "mem_fraction_static") == (
        "--mem-fraction-static 0.15 allows weights and KV pages 12.8 GB of NVIDIA H100's 85.0 GB; the "
        "weights alone take 16.1 GB, and a page of 16 tokens 2.1 MB: raise it to 0.21, which holds 13632 "
        "tokens, or use a smaller model"
    )
    suggested = plan_pool(WISH._replace(fraction=0.21), H100, beside(3 * GB))
    assert suggested.num_pages * 16 == 13_632


def test_where_no_share_would_do_a_size_is_suggested() -> None:
    full = DeviceMemory("GPU", 800 * GB, 5 * GB, 795 * GB)
    with pytest.raises(PhloemError, match=r"give --max-total-tokens \d+, or use a smaller model") as caught:
        plan_pool(WISH._replace(fraction=0.5), full, beside(GB))
    tokens = int(str(caught.value).split("--max-total-tokens ")[1].split(",")[0])
    plan = plan_pool(WISH._replace(fraction=0.5, max_total_tokens=tokens), full, beside(GB))
    assert plan.num_pages == tokens // 16


def obeyed(message: str, sizes: StepSizes) -> StepSizes:
    """The sizes that the sentence advises."""
    chunk = re.search(r"--chunked-prefill-size to (\d+)", message)
    running = re.search(r"--max-running-requests to (\d+)", message)
    assert chunk or running, message
    return StepSizes(
        int(chunk[1]) if chunk else sizes.chunk_tokens,
        int(running[1]) if running else sizes.running,
        sizes.graph_rows,
    )


@pytest.mark.parametrize("free", [3 * GB, int(3.5 * GB), 4 * GB])
def test_no_room_beside_graphs_and_steps_names_a_step_that_leaves_some(free: int) -> None:
    memory, found = H100._replace(free=free), beside(4 * GB)
    with pytest.raises(PhloemError) as caught:
        plan_pool(WISH, memory, found)
    message = told(caught, "chunked_prefill_size")
    assert (
        f"of the {gb(free)} free beside them on NVIDIA H100 CUDA graphs, the largest step and staging take "
        "4.5 GB, which leaves nothing for KV pages: lower --" in message
    )
    sizes = obeyed(message, DEFAULTS)
    plan = plan_pool(WISH, memory, beside(found.with_step(sizes), sizes=sizes))
    assert f"which leaves room for about {plan.num_pages * 16} tokens" in message
    assert plan.num_pages * 16 >= 8192 or "--chunked-prefill-size to 64" in message


def test_where_channels_are_in_the_way_fewer_peers_are_advised() -> None:
    memory, found = H100._replace(free=4 * GB), beside(3 * GB, channels=3 * GB, one_channel=GB)
    with pytest.raises(PhloemError, match=r"and --transfer-peers to 1, which leaves room") as caught:
        plan_pool(WISH, memory, found)
    sizes = obeyed(str(caught.value), DEFAULTS)
    assert plan_pool(WISH, memory, beside(found.with_step(sizes), GB, sizes=sizes)).num_pages * 16 >= 8192


def test_a_pool_of_the_least_is_advised_where_a_useful_one_can_not_be_had() -> None:
    memory, found = H100._replace(free=int(1.2 * GB)), beside(3 * GB)
    with pytest.raises(PhloemError, match=r"leaves room for about (\d+) tokens") as caught:
        plan_pool(WISH, memory, found)
    sizes = obeyed(str(caught.value), DEFAULTS)
    assert 2 <= plan_pool(WISH, memory, beside(found.with_step(sizes), sizes=sizes)).num_pages < 512


def test_where_no_step_is_small_enough_the_sentence_says_what_the_smallest_needs() -> None:
    with pytest.raises(PhloemError) as caught:
        plan_pool(WISH, H100._replace(free=int(0.6 * GB)), beside(4 * GB, 2 * GB, GB))
    message = told(caught, "device")
    assert re.search(
        r"and even --chunked-prefill-size 64 --max-running-requests 1 --transfer-peers 1 would need "
        r"2\.\d GB: stop what else uses the device \(68\.3 GB\), or use one with more memory$",
        message,
    )


def test_max_total_tokens_is_taken_whatever_the_fraction_says() -> None:
    wish = WISH._replace(max_total_tokens=100_000, fraction=0.01)
    assert plan_pool(wish, H100, beside(3 * GB)).num_pages == 6250


def test_max_total_tokens_that_do_not_fit_are_refused_with_the_number_that_does() -> None:
    with pytest.raises(PhloemError) as caught:
        plan_pool(WISH._replace(max_total_tokens=1_000_000), H100, beside(3 * GB))
    message = told(caught, "max_total_tokens")
    assert message.startswith("--max-total-tokens 1000000 needs 131.1 GB of KV pages")
    most = int(message.rpartition("lower it to ")[2])
    assert plan_pool(WISH._replace(max_total_tokens=most), H100, beside(3 * GB)).num_pages == most // 16
    with pytest.raises(PhloemError):
        plan_pool(WISH._replace(max_total_tokens=most + 16), H100, beside(3 * GB))


def test_max_total_tokens_below_two_pages_is_refused() -> None:
    with pytest.raises(PhloemError) as caught:
        plan_pool(WISH._replace(max_total_tokens=31), H100, beside(0))
    assert "give at least 32" in told(caught, "max_total_tokens")


def test_pool_that_was_taken_from_under_us_names_one_that_fits() -> None:
    error = pool_not_allocated(30_000, PAGE, 16, H100._replace(free=10 * GB), 2 * GB)
    assert error.code == "out_of_memory"
    assert "KV pages for 480000 tokens, 62.9 GB" in str(error)
    tokens = int(str(error).split("--max-total-tokens ")[1].split(",")[0])
    assert (tokens // 16 + 1) * PAGE + MARGIN_BYTES <= 8 * GB < (tokens // 16 + 2) * PAGE + MARGIN_BYTES


def test_pool_that_was_taken_whole_is_not_to_be_made_smaller() -> None:
    message = str(pool_not_allocated(30_000, PAGE, 16, H100._replace(free=2 * GB), 2 * GB))
    assert message.endswith("were free; stop what else uses the device")


def test_staging_is_set_aside_for_the_peers_that_a_role_has() -> None:
    options = EngineOptions(staging_bytes=1 << 20, staging_slots=4)
    assert [transfer_peers(options, role) for role in ("prefill", "decode", "unified")] == [8, 8, 2]
    few = msgspec.structs.replace(options, transfer_peers=3)
    assert [transfer_peers(few, role) for role in ("prefill", "unified")] == [3, 3]
    assert staging_reserve(few) == (3 - 1 + 4) << 20
    narrow = msgspec.structs.replace(few, transfer_max_ctas=8)
    assert channels_reserve(few, num_peers=1) == channels_reserve(
        msgspec.structs.replace(few, transfer_peers=1)
    )
    for each, ctas in ((few, 32), (narrow, 16)):
        assert channels_reserve(each) - staging_reserve(each) == 3 * ctas * NCCL_BYTES_PER_CTA
    assert 150 << 20 < (channels_reserve(few) - staging_reserve(few)) / 3 < 256 << 20, "as measured"
    message = str(staging_not_allocated(staging_reserve(few) << 10, H100))
    assert message.startswith("6.4 GB of staging memory for KV transfer could not be allocated: 68.0 GB of")
    assert "lower --transfer-peers or --staging-bytes" in message

"""Whole runs against a server with known delays: are the figures true, and is the report honest?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from phloem.shared.bench.client.connection import Inbox
from phloem.shared.bench.client.lag import LagMeter
from phloem.shared.bench.client.requester import Ask, Requester
from phloem.shared.bench.datasets.options import DatasetOptions
from phloem.shared.bench.lengths import LengthRange
from phloem.shared.bench.options import LoadOptions
from phloem.shared.bench.protocol import ApiName
from phloem.shared.bench.result import RunResult
from phloem.shared.bench.statistics import summarize
from phloem.shared.errors import PhloemError
from tests.support.bench import (
    bench_options,
    delay_target,
    run_bench,
    server_log,
    true_latencies,
)
from tests.support.delay_server import running_delay_server

HEAVY_TAIL = {"ttft_ms": 30, "itl_ms": 4, "tail": 1.3}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_delay_server() as base:
        yield base


def tolerance_ms(value: float, result: RunResult) -> float:
    """2% or 1 ms, whichever is more; on a busy machine also what the client itself measured to be late."""
    lag = result.lag
    late = max(summary.max for summary in (lag.loop, lag.spans) if summary is not None)
    return max(0.02 * value, 1.0) + (late if late > 1.0 else 0.0)


@pytest.mark.parametrize("delay", [{"ttft_ms": 50, "itl_ms": 10}, HEAVY_TAIL])
async def test_every_figure_is_what_the_server_did(url: str, delay: dict[str, Any]) -> None:
    options = bench_options(
        delay_target(url, **delay),
        dataset=DatasetOptions(input_lengths=LengthRange(4, 4), output_lengths=LengthRange(20, 20)),
        load=LoadOptions(concurrency=4, num_prompts=24),
    )
    # On a busy machine a whole process may stand still between a server's stamp and a client's: a wrong
    # definition fails every time, a crowded core doesn't.
    for _ in range(5):
        result = await run_bench(options)
        check_counts(result)
        wrong = wrong_figures(result, server_log(url))
        if not wrong:
            return
    pytest.fail("; ".join(wrong))


def check_counts(result: RunResult) -> None:
    figures, records = result.targets[0].figures, result.targets[0].records
    assert figures["completed"] == 24
    assert figures["total_output_tokens"] == 480
    assert figures["total_input_tokens"] == 96
    duration = figures["duration"]
    assert isinstance(duration, float)
    assert figures["output_throughput"] == pytest.approx(480 / duration)
    assert figures["concurrency"] == pytest.approx(
        sum(record.e2e_ms for record in records) / 1e3 / duration, rel=1e-3
    )


def wrong_figures(result: RunResult, log: dict[str, dict[str, Any]]) -> list[str]:
    """The figures that are further from the server's than the bar, and from what the client admits."""
    target = result.targets[0]
    wrong = []
    for metric, values in true_latencies([log[record.id] for record in target.records]).items():
        expected = summarize(values)
        assert expected is not None
        for stat in ("mean", "median", "p90", "p95", "p99"):
            got, true = target.figures[f"{stat}_{metric}_ms"], getattr(expected, stat)
            assert isinstance(got, float)
            if abs(got - true) > tolerance_ms(true, result):
                wrong.append(f"{stat} {metric}: {got:.2f} for {true:.2f}")
    return wrong


async def test_medians_are_the_nominal_delays(url: str) -> None:
    result = await run_bench(bench_options(delay_target(url, ttft_ms=50, itl_ms=10)))
    figures = result.targets[0].figures
    assert figures["median_ttft_ms"] == pytest.approx(50, abs=1 + tolerance_ms(50, result))
    assert figures["median_itl_ms"] == pytest.approx(10, abs=tolerance_ms(10, result))
    assert figures["mean_itl_ms"] == pytest.approx(10, abs=tolerance_ms(10, result))


@pytest.mark.parametrize("api", ["completions", "chat", "generate"])
async def test_every_api_counts_tokens_and_cache_hits(url: str, api: ApiName) -> None:
    target = delay_target(url, api=api, ttft_ms=5, itl_ms=2, tokens_per_chunk=3, cached_tokens=4)
    result = await run_bench(bench_options(target))
    figures = result.targets[0].figures
    assert figures["completed"] == 10
    assert figures["total_output_tokens"] == 80
    assert figures["total_cached_tokens"] == 40
    assert [list(record.chunk_tokens) for record in result.targets[0].records] == [[3, 3, 2]] * 10
    assert figures["mean_chunk_itl_ms"] == pytest.approx(2, abs=tolerance_ms(2, result))
    gaps = [record.chunk_ms[2] - record.chunk_ms[0] for record in result.targets[0].records]
    assert figures["mean_itl_ms"] == pytest.approx(statistics.mean(gaps) / 5, abs=1e-2)


@pytest.mark.parametrize("api", ["completions", "chat"])
async def test_the_openai_client_sees_the_same_request(url: str, api: ApiName) -> None:
    spec = delay_target(url, api=api, ttft_ms=50, itl_ms=10)
    requester = Requester(0, spec, Inbox(LagMeter()), timeout_s=20, keep_pieces=True)
    kind, piece = ("messages", b'{"role":"user","content":"a b"}') if api == "chat" else ("tokens", b"1,2")
    record = (await requester.ask(Ask(kind, [piece], 12, 0.0, block=900))).record  # type: ignore[arg-type]
    requester.close()
    texts, stamps, usage = await openai_view(url, api)
    assert texts == record.pieces
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        record.prompt_tokens if api == "completions" else usage.prompt_tokens,
        record.output_tokens,
    )
    ours = [offset - record.offsets()[0] for offset in record.offsets()]
    theirs = [stamp - stamps[0] for stamp in stamps]
    # Both have the server's 110 ms between first and last token; what is over is the machine's noise.
    assert ours[-1] == pytest.approx(0.110, abs=0.1)
    assert theirs[-1] == pytest.approx(ours[-1], abs=0.1)


async def openai_view(url: str, api: ApiName) -> tuple[list[str], list[float], Any]:
    """Texts, arrival times and usage of one streamed request by the official client."""
    texts: list[str] = []
    stamps: list[float] = []
    usage = None
    extra = {"delay": {"ttft_ms": 50, "itl_ms": 10}}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        options: dict[str, Any] = {
            "model": "delay-model",
            "max_tokens": 12,
            "stream": True,
            "stream_options": {"include_usage": True},
            "extra_body": extra,
        }
        if api == "chat":
            stream: Any = await client.chat.completions.create(
                messages=[{"role": "user", "content": "a b"}], **options
            )
        else:
            stream = await client.completions.create(prompt=[1, 2], **options)
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text = choice.delta.content if api == "chat" else choice.text
                if text:
                    texts.append(text)
                    stamps.append(time.monotonic())
    return texts, stamps, usage


async def test_usage_at_the_end_only_leaves_chunk_sizes_unknown(url: str) -> None:
    target = delay_target(url, ttft_ms=5, itl_ms=2, tokens_per_chunk=2, counts=False)
    result = await run_bench(bench_options(target))
    figures = result.targets[0].figures
    assert figures["total_output_tokens"] == 80
    assert "mean_itl_ms" not in figures
    assert isinstance(figures["mean_chunk_itl_ms"], float)
    assert any("no ITL per token" in remark for remark in result.remarks)


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("status", "HTTP 503: the pool is full"),
        ("cut", "connection: "),
        ("error_event", "out of pages"),
        ("empty", "no tokens came"),
        ("hang", "no complete answer within 2 s"),
    ],
)
async def test_failures_are_counted_and_latencies_refused(url: str, fail: str, message: str) -> None:
    options = bench_options(delay_target(url, ttft_ms=5, itl_ms=2, fail=fail, fail_every=5), timeout_s=2.0)
    result = await run_bench(options)
    figures, records = result.targets[0].figures, result.targets[0].records
    errors = [record.error for record in records if record.error]
    assert len(records) == 10
    assert len(errors) == 2
    assert all(message in error for error in errors)
    assert figures["failed"] == len(errors)
    assert not result.is_valid
    assert "flatter" in result.problems[0]
    assert not any(key.endswith("_ms") and "stalls" not in key for key in figures)


async def test_a_target_that_is_down_is_an_error_before_the_run() -> None:
    with pytest.raises(PhloemError, match="no answer from"):
        await run_bench(bench_options(delay_target("http://127.0.0.1:9")))


async def test_a_target_that_refuses_says_why(url: str) -> None:
    with pytest.raises(PhloemError, match="HTTP 503: the pool is full"):
        await run_bench(bench_options(delay_target(url, fail="status")))


async def test_a_strict_target_is_asked_without_what_it_refuses(url: str) -> None:
    refuses = ["continuous_usage_stats", "ignore_eos"]
    result = await run_bench(bench_options(delay_target(url, ttft_ms=5, itl_ms=1, refuses=refuses)))
    target = result.targets[0]
    assert target.refused == ("continuous_usage_stats", "ignore_eos")
    assert target.figures["completed"] == 10
    assert target.figures["total_output_tokens"] == 80
    assert "t: refused continuous_usage_stats, ignore_eos, so it was asked without" in result.remarks


async def test_a_target_that_refuses_prompts_is_told_apart(url: str) -> None:
    with pytest.raises(PhloemError, match=r"Unexpected fields: prompt.*--prompt-as text"):
        await run_bench(bench_options(delay_target(url, refuses=["prompt"])))


async def test_without_usage_counts_are_unknown_but_latencies_are_not(url: str) -> None:
    target = delay_target(url, ttft_ms=5, itl_ms=1, usage=False, counts=False)
    result = await run_bench(bench_options(target))
    figures = result.targets[0].figures
    assert figures["total_output_tokens"] is None
    assert figures["output_throughput"] is None
    assert "mean_tpot_ms" not in figures
    assert isinstance(figures["mean_ttft_ms"], float)
    assert "t: the server sends no usage: without --tokenizer token counts are unknown" in result.remarks


async def test_turns_repeat_the_answers_before_them(url: str) -> None:
    options = bench_options(
        delay_target(url, api="chat", ttft_ms=2, itl_ms=1),
        dataset=DatasetOptions(
            name="multi-turn", num_turns=3, input_lengths=LengthRange(3, 3), output_lengths=LengthRange(2, 2)
        ),
        load=LoadOptions(concurrency=2, num_prompts=6, warmup_requests=0),
    )
    result = await run_bench(options)
    records = sorted(result.targets[0].records, key=lambda record: (record.session, record.turn))
    assert [(record.session, record.turn) for record in records] == [
        (s, t) for s in (0, 1) for t in (0, 1, 2)
    ]
    log = server_log(url)
    prompts = [log[record.id]["prompt"] for record in records[:3]]
    assert [prompt.count("'assistant'") for prompt in prompts] == [0, 1, 2]
    assert "' w w'" in prompts[1]
    assert prompts[2].startswith(prompts[1].removesuffix("]"))


@pytest.mark.parametrize("token_ids", [True, False])
async def test_token_prompts_grow_by_the_answers_tokens(url: str, token_ids: bool) -> None:
    options = bench_options(
        delay_target(url, ttft_ms=2, itl_ms=1, token_ids=token_ids),
        dataset=DatasetOptions(
            name="multi-turn", num_turns=2, input_lengths=LengthRange(5, 5), output_lengths=LengthRange(3, 3)
        ),
        load=LoadOptions(concurrency=1, num_prompts=2, warmup_requests=0),
    )
    result = await run_bench(options)
    first, second = (server_log(url)[record.id]["prompt"] for record in result.targets[0].records)
    assert len(first) == 5
    assert second[:5] == first
    assert len(second) == 5 + 3 + 5
    assert (second[5:8] == [7, 7, 7]) == token_ids
    assert result.remarks == []

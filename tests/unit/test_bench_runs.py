"""How `bench serve` runs: schedules, several clients and targets, ends before the end, what is written."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from phloem.shared.bench.controller import Controller
from phloem.shared.bench.options import LoadOptions, SearchOptions
from phloem.shared.bench.protocol import Tick
from phloem.shared.bench.result import read_result, write_result
from phloem.shared.bench.slo import parse_slo
from phloem.shared.errors import ConfigError, PhloemError
from tests.support.bench import (
    SilentWatcher,
    bench_options,
    delay_target,
    run_bench,
    server_log,
)
from tests.support.delay_server import running_delay_server


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_delay_server() as base:
        yield base


async def test_open_loop_keeps_its_schedule(url: str) -> None:
    options = bench_options(
        delay_target(url, ttft_ms=100, itl_ms=2),
        load=LoadOptions(first_rate=50, last_rate=50, arrival="constant", num_prompts=20),
    )
    result = await run_bench(options)
    records = sorted(result.targets[0].records, key=lambda record: record.session)
    assert [record.scheduled_s for record in records] == pytest.approx([i / 50 for i in range(20)], abs=1e-4)
    # One clock for both, and a sleep that doesn't trust early timers: nothing is sent before its time.
    assert all(record.sent_s >= record.scheduled_s for record in records)
    assert result.lag.dispatch is not None
    assert result.lag.dispatch.count == 20
    assert result.targets[0].figures["peak_concurrency"] in range(4, 21)


async def test_concurrency_caps_an_open_loop(url: str) -> None:
    load = LoadOptions(concurrency=2, first_rate=float("inf"), last_rate=float("inf"), num_prompts=8)
    result = await run_bench(bench_options(delay_target(url, ttft_ms=5, itl_ms=1), load=load))
    assert result.targets[0].figures["peak_concurrency"] == 2


async def test_duration_ends_a_closed_loop(url: str) -> None:
    load = LoadOptions(concurrency=3, duration_s=0.6)
    result = await run_bench(bench_options(delay_target(url, ttft_ms=20, itl_ms=2), load=load))
    records = result.targets[0].records
    assert len(records) >= 3
    assert max(record.scheduled_s for record in records) < 1.0  # of 0.6, on a busy machine
    assert result.targets[0].figures["failed"] == 0


async def test_several_clients_share_the_load(url: str) -> None:
    options = bench_options(
        delay_target(url, ttft_ms=10, itl_ms=1),
        load=LoadOptions(concurrency=4, num_prompts=40),
        num_clients=2,
    )
    result = await run_bench(options)
    assert sorted(record.session for record in result.targets[0].records) == list(range(40))
    assert result.targets[0].figures["peak_concurrency"] == 4


async def test_targets_take_turns_with_the_same_prompts(url: str) -> None:
    watcher = SilentWatcher()
    slow, fast = delay_target(url, name="slow", ttft_ms=30), delay_target(url, name="fast", ttft_ms=10)
    result = await run_bench(bench_options(slow, fast, num_rounds=4), watcher)
    order = [phase.split(":")[0] for phase in watcher.phases if "round" in phase]
    assert order == ["slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]
    prompts = []
    log = server_log(url)
    for target in result.targets:
        records = sorted(target.records, key=lambda record: record.session)
        prompts.append([log[record.id]["prompt"] for record in records])
    assert prompts[0] == prompts[1]
    blocks = sorted(
        (block.started_s, block.duration_s) for target in result.targets for block in target.blocks
    )
    assert all(start + length <= after[0] for (start, length), after in itertools.pairwise(blocks))


async def test_targets_can_be_loaded_together(url: str) -> None:
    names = ("a", "b")
    targets = [delay_target(url, name=name, ttft_ms=40) for name in names]
    result = await run_bench(bench_options(*targets, order="together"))
    (first,), (second,) = (target.blocks for target in result.targets)
    assert first.started_s < second.started_s + second.duration_s
    assert second.started_s < first.started_s + first.duration_s


async def test_flush_cache_is_called_on_the_server(url: str) -> None:
    before = server_log(url).get("flush")
    await run_bench(bench_options(delay_target(url, ttft_ms=2, itl_ms=1), flush_cache=True))
    assert server_log(url)["flush"] != before


async def test_find_rate_reports_trials_and_the_rate(url: str) -> None:
    options = bench_options(
        delay_target(url, ttft_ms=2, itl_ms=1),
        load=LoadOptions(first_rate=20, last_rate=20, num_prompts=4),
        objectives=parse_slo("ttft:60s"),
        search=SearchOptions(max_trials=3),
    )
    result = await run_bench(options)
    assert [trial.rate for trial in result.targets[0].trials] == [20, 40, 80]
    assert all(trial.holds for trial in result.targets[0].trials)


async def test_lag_over_the_limit_makes_a_run_invalid(url: str) -> None:
    result = await run_bench(bench_options(delay_target(url, ttft_ms=2, itl_ms=1), max_lag_ms=1e-9))
    assert not result.is_valid
    assert "the client itself was late" in result.problems[-1]


async def test_interrupted_run_keeps_what_it_has(url: str) -> None:
    options = bench_options(delay_target(url, ttft_ms=20), load=LoadOptions(concurrency=1, duration_s=60.0))

    class Stopper(SilentWatcher):
        def tick(self, tick: Tick) -> None:
            if tick.succeeded >= 3:
                controller.stop()

    controller = Controller(options, Stopper(), [])
    result = await controller.run()
    assert result.is_interrupted
    completed = result.targets[0].figures["completed"]
    assert isinstance(completed, int)
    assert completed >= 3


async def test_a_second_stop_gives_up_what_is_in_flight(url: str) -> None:
    options = bench_options(delay_target(url, fail="hang", fail_every=1), timeout_s=600.0)

    class Stopper(SilentWatcher):
        def tick(self, tick: Tick) -> None:
            if tick.in_flight and any("round" in phase for phase in self.phases):
                controller.stop()

    controller = Controller(options, Stopper(), [])
    async with asyncio.timeout(60):
        result = await controller.run()
    assert result.is_interrupted
    assert result.problems == ["t: no request succeeded"]


async def test_a_client_that_dies_is_an_error_and_no_hang(url: str) -> None:
    options = bench_options(delay_target(url, fail="hang", fail_every=1), timeout_s=600.0)

    class Killer(SilentWatcher):
        def tick(self, tick: Tick) -> None:
            for child in psutil.Process().children():
                if "phloem.shared.bench.client.main" in child.cmdline():
                    child.kill()

    async with asyncio.timeout(60):
        with pytest.raises(PhloemError, match="client process 0 ended early"):
            await run_bench(options, Killer())


async def test_result_survives_its_file_and_hides_keys(url: str, tmp_path: Path) -> None:
    spec = delay_target(url, ttft_ms=5, itl_ms=1)
    spec = msgspec.structs.replace(spec, headers=(("authorization", "Bearer sk-secret"),))
    result = await run_bench(bench_options(spec, save_text=True))
    for name in ("run.json", "run.json.gz"):
        write_result(result, tmp_path / name)
        assert read_result(tmp_path / name) == result
    assert "sk-secret" not in (tmp_path / "run.json").read_text()
    assert result.targets[0].records[0].text == " w" * 8
    assert result.environment.num_cores >= 1
    assert result.command == ["phloem", "bench", "serve"]
    assert result.targets[0].model == "delay-model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load": LoadOptions(concurrency=1)}, "--num-prompts or --duration"),
        ({"load": LoadOptions(concurrency=2, num_prompts=4), "num_clients": 3}, "--clients"),
        ({"search": SearchOptions()}, "--slo"),
        ({"num_rounds": 11}, "--rounds"),
        ({"allowed_failures": 1.0}, "--allow-failures"),
        ({"tokenizer": "/nowhere"}, "--tokenizer"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    options = bench_options(delay_target("http://127.0.0.1:9"), **changes)
    with pytest.raises(ConfigError, match=message):
        Controller(options, SilentWatcher(), [])

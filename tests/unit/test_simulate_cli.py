"""`phloem simulate` as a command: tables, JSON, plot, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from phloem.cli.main import run
from phloem.cli.simulate import Report
from phloem.simulate.bars import check, ideal_hit_rates
from phloem.simulate.options import ClusterShape, SimulationOptions
from phloem.simulate.study import find_rate_scale
from phloem.simulate.workload import SimRequest, load_trace, shared_prefix

SMALL = ["--prefill", "2", "--decode", "2"]


def _trace(folder: Path, num_requests: int = 40) -> Path:
    path = folder / "trace.jsonl"
    rows = [
        {
            "timestamp": 100 * n,
            "input_length": 2000,
            "output_length": 20,
            "hash_ids": [0, n % 5, 100 + n, 200 + n],
        }
        for n in range(num_requests)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "flags",
    [
        "--rate-scale 0",
        "--rate-scale nan",
        "--heartbeat-s 0",  # would beat for ever at one moment
        "--poll-s=-1",
        "--transfer-bytes-per-s 0",
        "--max-running 0",  # nobody would ever be served
        "--page-tokens 0",
        "--grain 0",
        "--prefill=-1",
        "--num-requests=-3",
        "--kv-tokens 1536",
        "--policies bogus",
    ],
)
def test_what_can_not_be_simulated_is_said_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    argv = ["simulate", str(_trace(tmp_path)), "--jobs", "1", "--policies", "cost", *flags.split()]
    assert run(argv) == 2
    assert "phloem: error: " in capsys.readouterr().err


def test_a_trace_is_compared_by_policy_into_json_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plot = tmp_path / "out.json", tmp_path / "out.svg"
    trace = _trace(tmp_path)
    argv = ["simulate", str(trace), *SMALL, "--jobs", "1", "--policies", "cost,random", "-o", str(output)]
    assert run([*argv, "--plot", str(plot), "--rate-scale", "2"]) == 0
    report = msgspec.json.decode(output.read_bytes(), type=Report)
    assert [result.options.policy for result in report.results] == ["cost", "random"]
    assert all(len(result.ttfts_s) == 40 and not result.problems for result in report.results)
    assert report.results[0].options.rate_scale == 2.0
    printed = capsys.readouterr().out
    assert "random" in printed and f"infinite {report.ideal_hit_rates['infinite']:.1%}" in printed
    svg = ElementTree.fromstring(plot.read_text())
    assert svg.tag.endswith("svg")
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}polyline"))) == 4  # two policies in two charts


def test_flags_change_the_modelled_device(tmp_path: Path) -> None:
    fast, slow = tmp_path / "fast.json", tmp_path / "slow.json"
    argv = ["simulate", str(_trace(tmp_path)), *SMALL, "--policies", "round_robin", "-o"]
    assert run([*argv, str(fast)]) == run([*argv, str(slow), "--prefill-token-s", "0.001"]) == 0
    reports = [msgspec.json.decode(path.read_bytes(), type=Report) for path in (fast, slow)]
    assert reports[0].results[0].ttft_p50_s < 0.2 < 1.0 < reports[1].results[0].ttft_p50_s


def test_processes_of_their_own_find_the_same(tmp_path: Path) -> None:
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for jobs, path in zip(("1", "2"), files, strict=True):
        argv = ["simulate", "--num-requests", "60", *SMALL, "--policies", "cost,least_loaded"]
        assert run([*argv, "--jobs", jobs, "-o", str(path)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "argv",
    [
        ["--policies", "nonsense"],
        ["--decode", "0"],
        ["--grain", "3"],
        ["--gateways", "0"],
        ["--plot", "out.gif"],
        ["--check"],
    ],
)
def test_what_can_not_be_simulated_is_said_and_exits_with_2(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["simulate", "--num-requests", "5", *SMALL, *argv]) == 2


def _bursts() -> list[SimRequest]:
    """Four prompts at once, each second: a queue even of an idle cluster."""
    return [SimRequest(n, float(n // 4), 4096, 20, range(8 * n, 8 * n + 8)) for n in range(80)]


def test_the_search_ends_at_a_load_within_the_limits() -> None:
    options = SimulationOptions(policy="round_robin", shape=ClusterShape(num_prefill=1, num_decode=1))
    found = find_rate_scale(_bursts(), options, low_s=0.5, high_s=1.5, progress=lambda line: None)
    assert 0.5 <= found.ttft_p90_s <= 1.5
    assert found.options.rate_scale > 1.0


def test_the_check_measures_every_bar(tmp_path: Path) -> None:
    shared = shared_prefix(60, rate=30.0, seed=1)
    options = SimulationOptions(shape=ClusterShape(num_prefill=1, num_decode=1))
    found = check(_bursts(), shared, options, jobs=1, progress=lambda line: None)
    num_gateways = [result.options.shape.num_gateways for result in found.results]
    assert num_gateways == [1, 1, 1, 1, 1, 2, 2, 4, 4, 8, 8, 1]
    assert not any(result.problems for result in found.results)
    assert len(found.bars) == 8
    assert [result.options.shape.num_gateways for result in found.at_load] == [1, 1, 1, 1, 8]
    assert not found.is_met  # nothing is shared in these prompts: no policy can be better than another


def test_ideal_caches_are_of_the_prefill_pool_of_all_workers_and_infinite(tmp_path: Path) -> None:
    requests = load_trace(_trace(tmp_path))
    shape = ClusterShape(num_prefill=1, num_decode=1, kv_tokens=2048)
    ideal = ideal_hit_rates(requests, SimulationOptions(shape=shape))
    assert 0.0 < ideal["prefill pool"] <= ideal["all workers"] <= ideal["infinite"]

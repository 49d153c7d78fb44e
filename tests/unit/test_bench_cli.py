"""`phloem bench serve` and `compare` as a user meets them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from phloem.cli.bench.flags import (
    DatasetFlags,
    LoadFlags,
    OutputFlags,
    TargetFlags,
    VerdictFlags,
    parse_share,
    run_options,
)
from phloem.cli.bench.live import LineView
from phloem.cli.bench.serve import EXIT_INVALID, hide_secrets
from phloem.cli.main import run
from phloem.shared.bench.comparison import Comparison, Ratio, compare_targets
from phloem.shared.bench.options import RunOptions
from phloem.shared.bench.plot_data import cdf_points, charts_of
from phloem.shared.bench.plot_html import render_html
from phloem.shared.bench.protocol import Tick
from phloem.shared.bench.result import RunResult, TargetResult, read_result
from phloem.shared.errors import ConfigError
from tests.support.bench import bench_options, delay_target, run_bench
from tests.support.delay_server import running_delay_server

NO_LAG_LIMIT = ["--max-lag", "1h"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_delay_server() as base:
        yield base


@pytest.fixture(scope="module")
def slow_and_fast(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two targets in six rounds, the second 20 ms faster to the first token."""
    path = tmp_path_factory.mktemp("bench") / "run.json"
    targets = [delay_target(url, name="slow", ttft_ms=40), delay_target(url, name="fast", ttft_ms=20)]
    options = bench_options(*targets, num_rounds=5)
    import asyncio

    from phloem.shared.bench.result import write_result

    write_result(asyncio.run(run_bench(options)), path)
    return path


def options_of(
    *,
    targets: TargetFlags | None = None,
    data: DatasetFlags | None = None,
    load: LoadFlags | None = None,
    verdict: VerdictFlags | None = None,
) -> RunOptions:
    return run_options(
        targets or TargetFlags(),
        data or DatasetFlags(),
        load or LoadFlags(),
        verdict or VerdictFlags(),
        OutputFlags(),
    )


def ratio(comparison: Comparison, label: str) -> Ratio:
    return next(ratio for ratio in comparison.ratios if ratio.label == label)


def test_serve_prints_the_table_and_writes_the_files(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result_path, plot_path = tmp_path / "run.json", tmp_path / "run.html"
    argv = [
        "bench",
        "serve",
        "--target",
        url,
        "--num-prompts",
        "4",
        "--output-len",
        "3",
        "--input-len",
        "5:9",
    ]
    argv += ["--slo", "ttft:60s", "-o", str(result_path), "--plot", str(plot_path), *NO_LAG_LIMIT]
    assert run(argv) == 0
    shown = capsys.readouterr()
    for label in ("Successful requests", "Output token throughput (tok/s)", "TTFT", "ITL", "TPOT", "Goodput"):
        assert label in shown.out
    assert "round 1 of 1 (4 requests)" in shown.err
    result = read_result(result_path)
    assert result.targets[0].figures["completed"] == 4
    assert result.targets[0].figures["goodput_good"] == 4
    assert plot_path.read_text().startswith("<!doctype html>")


def test_a_run_with_failures_exits_with_3_and_says_why(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    body = '{"delay":{"ttft_ms":2,"itl_ms":1,"fail":"status","fail_every":2}}'
    argv = [
        "bench",
        "serve",
        "--target",
        url,
        "--num-prompts",
        "4",
        "--output-len",
        "3",
        "--extra-body",
        body,
    ]
    assert run([*argv, *NO_LAG_LIMIT]) == EXIT_INVALID
    shown = capsys.readouterr().out
    assert "INVALID: target: 2 of 4 requests failed" in shown
    assert "2 x HTTP 503: the pool is full" in shown
    assert "TTFT" not in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--target", "ftp://x"], "not an http:// or https:// URL"),
        (["--target", "http://u:p@x"], "must not hold a password"),
        (["--request-rate", "fast"], "--request-rate"),
        (["--concurrency", "1:8"], "needs --ramp or --duration"),
        (["--extra-body", "[1]"], "not a JSON object"),
        (["--plot", "x.pdf"], "must end in .html or .png"),
        (["--find-rate", "--request-rate", "1"], "--slo"),
        (["--dataset", "trace"], "needs a file"),
        (["--allow-failures", "many"], "is no share"),
        (["--dataset", "nonsense"], "nonsense"),
    ],
)
def test_bad_flags_exit_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "serve", *argv]) == 2
    assert message in capsys.readouterr().err


def test_help_needs_no_client_and_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    run(["bench", "serve", "--help"])
    shown = capsys.readouterr().out
    for flag in ("--target", "--dataset", "--request-rate", "--slo", "--find-rate", "--plot", "--max-lag"):
        assert flag in shown


def test_the_base_command_does_not_import_the_bench() -> None:
    code = (
        "import sys; import phloem.cli.main as m; m.build_app(); "
        "assert not [n for n in sys.modules if n.startswith('phloem.shared.bench')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_bench_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, phloem.cli.bench.serve, phloem.cli.bench.compare, phloem.shared.bench.client.main; "
        "assert not {'torch', 'numpy', 'transformers', 'matplotlib', 'httpx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_defaults_are_a_small_closed_loop() -> None:
    options = options_of()
    assert (options.load.concurrency, options.load.num_prompts, options.num_rounds) == (4, 64, 1)
    assert options.prompt_kind == "tokens"
    assert options_of(targets=TargetFlags(api="chat")).prompt_kind == "messages"


def test_targets_are_named_and_take_rounds() -> None:
    options = options_of(targets=TargetFlags(target=("a=http://x/", "http://y/v1?z=1"), api_key="k"))
    assert [(target.name, target.url) for target in options.targets] == [
        ("a", "http://x"),
        ("target-2", "http://y/v1?z=1"),
    ]
    assert options.num_rounds == 10
    assert options.targets[0].headers == (("authorization", "Bearer k"),)
    assert b"k" not in msgspec.json.encode(options.without_secrets().targets[0].headers)[17:]


def test_a_trace_keeps_its_times_unless_told_otherwise() -> None:
    trace = DatasetFlags(dataset="trace", dataset_path=Path("x"))
    own = options_of(data=trace, load=LoadFlags(duration="5s"))
    assert (own.load.concurrency, own.load.is_open, own.load.num_prompts) == (0, False, 0)
    assert options_of(data=trace, load=LoadFlags(concurrency="3")).load.concurrency == 3
    assert options_of(data=trace, load=LoadFlags(request_rate="2:8")).load.last_rate == 8


def test_shares_and_lag_limits_are_read() -> None:
    assert (parse_share("5%"), parse_share("0.05"), parse_share("0%")) == (0.05, 0.05, 0.0)
    with pytest.raises(ConfigError):
        parse_share("200%")
    assert options_of(verdict=VerdictFlags(max_lag="5ms")).max_lag_ms == 5
    assert options_of().max_lag_ms is None


def test_api_keys_are_not_recorded() -> None:
    argv = ["phloem", "--api-key", "sk-1", "--api-key=sk-2", "--model", "m"]
    assert hide_secrets(argv) == ["phloem", "--api-key", "***", "--api-key=***", "--model", "m"]


def test_compare_tells_faster_from_alike(slow_and_fast: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = read_result(slow_and_fast)
    slow, fast = result.targets
    comparison = compare_targets(result, slow, result, fast)
    ttft = ratio(comparison, "Median TTFT (ms)")
    assert ttft.verdict == "better"
    assert ttft.low is not None and ttft.high is not None
    assert ttft.low <= ttft.ratio <= ttft.high < 1
    assert ratio(comparison, "Request throughput (req/s)").low is not None
    same = compare_targets(result, slow, result, slow)
    assert {row.verdict for row in same.ratios} == {"same"}
    assert all(row.ratio == 1 for row in same.ratios)
    assert run(["bench", "compare", f"{slow_and_fast}#slow", f"{slow_and_fast}#fast"]) == 0
    shown = capsys.readouterr().out
    assert "fast / slow" in shown
    assert "separate runs" not in shown
    assert "better" in shown


def test_compare_of_other_prompts_or_single_blocks_warns(slow_and_fast: Path) -> None:
    first = read_result(slow_and_fast)
    other = msgspec.structs.replace(first, workload="other", is_valid=False, problems=["too late"])
    caveats = compare_targets(first, first.targets[0], other, other.targets[1]).caveats
    assert any("prompts differ" in caveat for caveat in caveats)
    assert any("separate runs" in caveat for caveat in caveats)
    assert any("too late" in caveat for caveat in caveats)
    single = [msgspec.structs.replace(target, blocks=target.blocks[:1]) for target in first.targets]
    comparison = compare_targets(first, single[0], first, single[1])
    assert any("--rounds" in caveat for caveat in comparison.caveats)
    assert ratio(comparison, "Request throughput (req/s)").verdict == "unknown"


@pytest.mark.parametrize("name", ["run.json#nobody", "run.json", "missing.json", "note.txt"])
def test_compare_refuses_what_it_cannot_pick(
    slow_and_fast: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (slow_and_fast.parent / "note.txt").write_text("{}")
    path = str(slow_and_fast.parent / name)
    assert run(["bench", "compare", path, path]) == 2
    assert "phloem: error:" in capsys.readouterr().err


def result_named(result: RunResult, name: str) -> RunResult:
    target: TargetResult = msgspec.structs.replace(result.targets[0], name=name)
    return msgspec.structs.replace(result, targets=[target, *result.targets[1:]])


def test_html_stands_alone_and_escapes(slow_and_fast: Path) -> None:
    page = render_html(result_named(read_result(slow_and_fast), "<script>alert(1)</script>"))
    assert page.count("<svg") == 7
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for title in ("Time to first token", "Inter-token latency", "TTFT over time", "Requests in flight"):
        assert title in page


def test_png_is_written(slow_and_fast: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from phloem.shared.bench.plot import write_plot

    path = tmp_path / "plot.png"
    write_plot(read_result(slow_and_fast), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000


def test_charts_show_both_targets_and_all_tokens(slow_and_fast: Path) -> None:
    result = read_result(slow_and_fast)
    charts = {chart.title: chart for chart in charts_of(result)}
    assert [curve.name for curve in charts["TTFT over time"].curves] == ["slow", "fast"]
    curve = charts["Output tokens over time"].curves[0]
    assert sum(curve.ys) * (curve.xs[1] - curve.xs[0]) == pytest.approx(80, rel=0.02)
    assert max(charts["Requests in flight"].curves[0].ys) == 1


def test_cdf_keeps_the_tail() -> None:
    xs, ys = cdf_points([float(value) for value in range(100_000)], num_points=50)
    assert len(xs) < 5200
    assert (xs[-1], ys[-1]) == (99_999, 1.0)
    assert sum(x >= 99_000 for x in xs) > 50
    assert cdf_points([]) == ([], [])


def test_line_view_says_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    view = LineView(Console())
    with view:
        view.phase("warming up a", 3)
        view.tick(Tick(sent=1, succeeded=1, failed=0, in_flight=0, tokens=5, lag_ms=0))
        view.phase("round 1", 0)
    assert capsys.readouterr().out.splitlines() == ["warming up a (3 requests)", "round 1"]

"""The bars of `phloem bench offline --check`: what is judged, and what is not."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from phloem.cli.bench.offline_table import print_bars, print_report
from phloem.shared.engine.config import EngineOptions
from phloem.shared.engine.offline.bars import (
    LIMITS,
    SHAPE,
    START_LIMIT_S,
    bars_of,
    measured_met,
    why_not_judged,
)
from phloem.shared.engine.offline.bench import Measurement, OfflineReport, model_shape
from phloem.shared.engine.offline.work import OfflineWork
from phloem.shared.errors import PhloemError
from phloem.shared.model_store.model_config import load_model_config

LLAMA = Path(__file__).parents[2] / "benchmarks" / "models" / "llama-3.1-8b"
GOOD = [
    Measurement("prefill", 1, 512, 19.0, 10.0),
    Measurement("prefill", 1, 8192, 14.0, 10.0),
    Measurement("decode", 1, 1024, 10.9, 10.0, host_ms=3.0, idle_percent=9.0),
    Measurement("decode", 64, 1024, 11.4, 10.0, host_ms=3.0, idle_percent=1.9),
    Measurement("decode", 256, 2048, 11.9, 10.0, host_ms=1.4, idle_percent=9.0),
    Measurement("decode, grammars", 64, 1024, 13.0, 10.0, host_ms=3.0, idle_percent=4.9),
    Measurement("decode, sampled", 64, 1024, 13.0, 10.0, host_ms=3.0, idle_percent=1.9),
]
SLOW = [Measurement("prefill", 1, 512, 21.0, 10.0), *GOOD[1:]]


def missed(rows: list[Measurement], start_s: float = 1.0) -> list[str]:
    return [bar.what for bar in bars_of(rows, start_s) if bar.is_measured and not bar.is_met]


def test_a_run_that_meets_everything() -> None:
    judged = bars_of(GOOD, 39.0)
    assert len(judged) == len(LIMITS) + 1
    assert all(bar.is_met for bar in judged) and measured_met(judged)


@pytest.mark.parametrize(
    ("index", "change", "what"),
    [
        (0, {"measured_ms": 20.1}, "prefill, 512 tokens"),
        (1, {"measured_ms": 14.6}, "prefill, 8,192 tokens"),
        (2, {"measured_ms": 11.1}, "decode, batch 1, context 1k"),
        (3, {"measured_ms": 11.6}, "decode, batch 64, context 1k"),
        (3, {"idle_percent": 2.1}, "idle device between decode steps, batch 64"),
        (5, {"idle_percent": 5.1}, "the same, grammar masks on half of the rows"),
        (6, {"idle_percent": 2.1}, "idle device between decode steps, batch 64, sampled"),
        (4, {"measured_ms": 12.1}, "decode, batch 256, context 2k"),
        (4, {"host_ms": 1.6}, "host's work per decode step, batch 256"),
    ],
)
def test_each_bar_is_missed_by_its_own_figure_alone(index: int, change: dict[str, float], what: str) -> None:
    row = GOOD[index]
    fields = {name: getattr(row, name) for name in row.__struct_fields__}
    rows = [*GOOD[:index], Measurement(**{**fields, **change}), *GOOD[index + 1 :]]
    assert missed(rows) == [what]
    assert not measured_met(bars_of(rows, 1.0))


def test_a_slow_start_is_missed() -> None:
    assert missed(GOOD, START_LIMIT_S + 0.1) == ["start to ready, kernels compiled before"]


def test_what_was_not_measured_is_not_judged() -> None:
    judged = bars_of(GOOD[:1], 1.0)
    assert [bar.what for bar in judged if not bar.is_measured] == [
        limit.what for limit in LIMITS if limit.what != "prefill, 512 tokens"
    ]
    assert measured_met(judged)
    assert not measured_met([])


def test_the_worst_of_several_rows_counts() -> None:
    again = Measurement("decode", 64, 1024, 12.0, 10.0, host_ms=3.0, idle_percent=0.0)
    assert missed([again, *GOOD]) == ["decode, batch 64, context 1k"]


def test_bars_are_about_the_committed_shape() -> None:
    assert model_shape(load_model_config(LLAMA)) == SHAPE


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "why"),
    [
        (SHAPE, "torch.bfloat16", "NVIDIA H100 80GB HBM3", None),
        (SHAPE, "torch.bfloat16", "NVIDIA H200", None),
        (SHAPE, "torch.bfloat16", "cpu", "this run was on cpu"),
        (SHAPE, "torch.float16", "NVIDIA H200", "this run was torch.float16"),
        ((28, *SHAPE[1:]), "torch.bfloat16", "NVIDIA H200", "shape of Llama-3.1-8B"),
    ],
)
def test_other_shapes_dtypes_and_devices_are_not_judged(
    shape: tuple[int, ...], dtype: str, device: str, why: str | None
) -> None:
    found = why_not_judged(shape, dtype, device)
    assert found is None if why is None else found is not None and why in found


@pytest.mark.parametrize(("rows", "code"), [(GOOD, 0), (GOOD[1:], 0), ([GOOD[0], GOOD[0]], 0), (SLOW, 1)])
def test_bars_are_printed_and_decide_the_exit_code(rows: list[Measurement], code: int) -> None:
    out = io.StringIO()
    assert print_bars(report(rows), Console(file=out, width=120)) == code
    assert ("MISSED" in out.getvalue()) == (code == 1)
    assert ("not measured" in out.getvalue()) == (len(rows) < len(GOOD))


def test_no_figure_is_cut_off_on_a_narrow_terminal() -> None:
    row = Measurement("decode, grammars", 256, 131_072, 12345.67, 2345.67, 23456.78, 765.43, 12.3)
    out = io.StringIO()
    print_report(report([row]), Console(file=out, width=80))
    for figure in ("131072", "12345.67", "2345.67", "5.26", "23456.78", "765.43", "12.3"):
        assert figure in out.getvalue()


def test_a_run_that_the_bars_are_not_about_is_refused() -> None:
    with pytest.raises(PhloemError, match="--check: the bars are for an H100 or H200, this run was on cpu"):
        print_bars(report(GOOD, device="cpu"), Console(file=io.StringIO()))


def report(rows: list[Measurement], device: str = "NVIDIA H200") -> OfflineReport:
    return OfflineReport(
        model="llama",
        engine=EngineOptions(),
        work=OfflineWork(prefill=(512,), decode=((64, 1024),)),
        device=device,
        dtype="torch.bfloat16",
        torch_version="2.11",
        read_gb_per_s=4000.0,
        matmul_tflops=800.0,
        start_s=6.0,
        measurements=rows,
        shape=SHAPE,
    )

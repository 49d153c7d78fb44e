"""`phloem bench offline` on a tiny model, on the CPU: its rows, its file, and what it refuses to start on."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from phloem.cli.main import run
from phloem.shared.engine.config import EngineOptions
from phloem.shared.engine.offline.bench import OfflineReport, with_gpu_share
from phloem.shared.engine.offline.work import SAMPLED_BATCH
from phloem.shared.transfer_bench.models import write_model

STEPS = 8


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """The command, of a model of four layers."""
    model = write_model("tiny", tmp_path / "model")
    flags = ["--model-path", str(model), "--load-format", "dummy", "--device", "cpu", "--dtype", "float32"]
    return ["bench", "offline", *flags, "--steps", str(STEPS), "--prefill", "16"]


def kinds(path: Path) -> list[tuple[str, int, int]]:
    report = msgspec.json.decode(path.read_bytes(), type=OfflineReport)
    assert all(row.measured_ms > 0 and row.floor_ms > 0 for row in report.measurements)
    return [(row.kind, row.batch, row.tokens) for row in report.measurements]


def test_greedy_and_sampled_steps_stand_beside_each_other(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    shapes = f"2x24,{SAMPLED_BATCH}x24"
    flags = ["--decode", shapes, "--sampled", "--disable-overlap-schedule", "--page-size", "8"]
    assert run([*tiny, *flags, "--output", str(file)]) == 0
    assert kinds(file) == [
        ("prefill", 1, 16),
        ("decode", 2, 24),
        ("decode", SAMPLED_BATCH, 24),
        ("decode, sampled", SAMPLED_BATCH, 24),
    ]
    report = msgspec.json.decode(file.read_bytes(), type=OfflineReport)
    assert report.engine.disable_overlap_schedule and report.engine.page_size == 8
    assert report.work.sampled and report.work.steps == STEPS
    assert "sampled" in capsys.readouterr().out


def test_a_shape_that_does_not_fit_is_refused_before_any_is_measured(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    flags = ["--decode", "1x24,65x24", "--context-length", "512", "--output", str(file)]
    assert run([*tiny, *flags]) == 2
    said = capsys.readouterr()
    assert said.err == (
        "phloem: error: --decode 65x24: the engine runs 64 requests at once: raise --max-running-requests "
        "to 65, or lower the batch\n"
    )
    assert said.out.split() == ["ceilings", "engine"] and not file.exists()


@pytest.mark.parametrize("shape", ["6x40", "6x200"])
def test_a_batch_runs_whole_in_the_pool_that_the_refusal_asks_for(
    shape: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`6x40` ends with fewer pages than its last request is admitted with."""
    file = tmp_path / "figures.json"
    command = [*tiny, "--decode", shape, "--output", str(file)]
    assert run([*command, "--max-total-tokens", "64"]) == 2
    needed = capsys.readouterr().err.partition("give --max-total-tokens ")[2].partition(",")[0]
    assert run([*command, "--max-total-tokens", str(int(needed) - 16)]) == 2
    assert run([*command, "--max-total-tokens", needed]) == 0
    batch, _, context = shape.partition("x")
    assert ("decode", int(batch), int(context)) in kinds(file)


def test_figures_are_shown_before_a_file_that_can_not_be_written_ends_the_run(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / ("x" * 300)  # longer than a name may be: nothing but writing finds that out
    assert run([*tiny, "--decode", "", "--output", str(file)]) == 2
    said = capsys.readouterr()
    assert "prefill" in said.out and "measured ms" in said.out
    assert said.err.startswith("phloem: error: can't write ") and "too long" in said.err


@pytest.mark.parametrize(
    ("device", "given", "used"), [("cuda:1", 0.0, 0.9), ("cuda", 0.5, 0.5), ("cpu", 0.0, 0.0)]
)
def test_a_gpu_is_the_instruments_own(device: str, given: float, used: float) -> None:
    options = EngineOptions(mem_fraction_static=given)
    assert with_gpu_share(options, torch.device(device)).mem_fraction_static == used

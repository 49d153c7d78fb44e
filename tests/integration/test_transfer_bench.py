"""`phloem bench transfer` between two CPU processes: it measures, and its report is whole."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from phloem.cli.bench.transfer import transfer
from phloem.cli.bench.transfer_flags import PairFlags, WorkFlags
from phloem.shared.transfer_bench.run import TransferReport


def test_report_of_two_cpu_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "transfer.json"
    work = WorkFlags(sizes="1", prompts="64", rounds=2, window_s=0.5)
    code = transfer(pair=PairFlags(device="cpu"), work=work, output=output, check=True)
    assert code == 0, "on a CPU nothing is judged"
    report = msgspec.json.decode(output.read_bytes(), type=TransferReport)
    assert report.bandwidth is not None
    for size in report.bandwidth.sizes:
        assert size.raw > 0 and size.pages is not None and size.pages > 0 and size.ratio is not None
    assert [item.prompt_tokens for item in report.exposed] == [64]
    assert report.exposed[0].exposed_ms.count == 3 and report.exposed[0].exposed_ms.max < 10_000
    assert [slow.what.split(",")[0] for slow in report.slow_downs] == [
        "prefill of 64 tokens",
        "decode step",
        "decode step",
    ]
    assert all(slow.ratio > 0 and slow.transfer_gb_per_s > 0 for slow in report.slow_downs)
    assert "paged KV / raw" in capsys.readouterr().out

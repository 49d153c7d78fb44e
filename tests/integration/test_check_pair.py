"""`benchmarks/check_pair.py` on a CPU, small: the very commands that prove a pair of GPUs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks import check_pair
from phloem.shared.bench.bars import Bar


@pytest.mark.parametrize(
    "arguments",
    [
        ("equality", "--requests", "24", "--longest", "600"),
        ("damage", "--requests", "6"),
        ("kills", "--count", "2", "--stop", "1"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_proof_holds_between_cpu_processes(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Every bar of a proof is judged here as there."""
    output = tmp_path / "bars.json"
    code = check_pair.main([*arguments, "--device", "cpu", "--output", str(output)])
    bars = msgspec.json.decode(output.read_bytes(), type=list[Bar]) if output.exists() else []
    assert code == 0, bars
    judged = [bar for bar in bars if bar.bound is not None]
    if arguments[0] == "kills":
        assert bars[0].value == 3
        assert len(judged) == 2 and bars[-1] not in judged, "so few losses say nothing of memory's growth"
    else:
        assert len(judged) >= 3

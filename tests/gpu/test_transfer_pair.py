"""KV between two GPUs over NCCL: equal tokens, damage that is noticed, killed peers, bytes that arrive."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from benchmarks import check_pair
from phloem.cli.up.devices import count_gpus
from phloem.shared.bench.bars import Bar
from phloem.shared.transfer_bench.bandwidth import BandwidthPlan, measure_bandwidth
from phloem.shared.transfer_bench.rank_protocol import KvShape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(count_gpus(os.environ) < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize(
    "arguments",
    [
        ("equality", "--requests", "60", "--longest", "8000"),
        ("damage", "--requests", "6"),
        ("kills", "--count", "2", "--stop", "1"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_proof_holds_on_two_gpus(arguments: tuple[str, ...], tmp_path: Path) -> None:
    output = tmp_path / "bars.json"
    code = check_pair.main([*arguments, "--device", "cuda", "--output", str(output)])
    assert code == 0, output.read_text() if output.exists() else "no result"
    assert msgspec.json.decode(output.read_bytes(), type=list[Bar])


@pytest.mark.parametrize("num_kv_heads", [8, 1])
def test_scattered_pages_arrive_whole(num_kv_heads: int, tmp_path: Path) -> None:
    """`measure_bandwidth` sums up every byte on both sides, by other arithmetic than the digest's."""
    plan = BandwidthPlan(
        sizes=(2**20, 37 * 2**20),
        shape=KvShape(num_layers=5, num_kv_heads=num_kv_heads, head_dim=64),
        gpus=(0, 1),
        ahead_bytes=2**27,
        rounds=2,
        log=tmp_path / "ranks.log",
    )
    report = measure_bandwidth(plan, lambda text: None)
    assert all(size.pages is not None and size.pages > 1.0 for size in report.sizes)

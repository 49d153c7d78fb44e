"""Traces and the synthetic workload."""

from __future__ import annotations

from pathlib import Path

import pytest

from phloem.shared.errors import ConfigError
from phloem.simulate.workload import SimRequest, load_trace, shared_prefix, spread_ticks

MOONCAKE = """\
{"timestamp": 0, "input_length": 1030, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 3000, "input_length": 512, "output_length": 1, "hash_ids": [0]}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,1396,109
"""


def _file(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


def test_mooncake_lines_are_requests_with_their_blocks(tmp_path: Path) -> None:
    first, second = load_trace(_file(tmp_path, MOONCAKE))
    assert (first.num_tokens, first.num_output_tokens, list(first.content)) == (1030, 5, [0, 1, 2])
    assert (second.arrival_s, list(second.content)) == (3.0, [0])


def test_azure_rows_share_nothing(tmp_path: Path) -> None:
    first, second = load_trace(_file(tmp_path, AZURE))
    assert first.arrival_s == 0.0
    assert second.arrival_s == pytest.approx(4.314579)
    assert len(second.content) == 3
    assert not set(first.content) & set(second.content)


def test_max_requests_takes_the_first_ones(tmp_path: Path) -> None:
    assert len(load_trace(_file(tmp_path, MOONCAKE), max_requests=1)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"timestamp": 0}\n',
        '{"timestamp": 0, "input_length": 1030, "output_length": 5, "hash_ids": [0]}\n',
        "a,b\n1,2\n",
    ],
)
def test_what_is_no_trace_is_a_config_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_trace(_file(tmp_path, text))


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't read"):
        load_trace(tmp_path / "none")


@pytest.mark.parametrize("grain", [1, 8, 16])
def test_equal_blocks_are_equal_units_and_others_differ_at_once(grain: int) -> None:
    one = SimRequest(0, 0.0, 1536, 1, [7, 8, 9]).prompt_units(grain)
    other = SimRequest(1, 0.0, 1536, 1, [7, 8, 5]).prompt_units(grain)
    per_block = 512 // grain
    assert len(one) == len(other) == 3 * per_block
    assert one[: 2 * per_block] == other[: 2 * per_block]
    assert one[2 * per_block] != other[2 * per_block]


def test_the_last_block_is_cut_to_the_length() -> None:
    assert len(SimRequest(0, 0.0, 515, 1, [1, 2]).prompt_units(8)) == 65


def test_ticks_are_spread_until_the_next_and_stay_in_order() -> None:
    requests = [SimRequest(n, 3.0 * (n // 10), 10, 1, [n]) for n in range(40)]
    spread = spread_ticks(requests, seed=1)
    times = [request.arrival_s for request in spread]
    assert times == sorted(times)
    for request in spread:
        tick = 3.0 * (request.index // 10)
        assert tick <= request.arrival_s <= min(tick + 3.0, 9.0)
    assert spread == spread_ticks(requests, seed=1) != spread_ticks(requests, seed=2)


def test_one_prefix_takes_its_share() -> None:
    requests = shared_prefix(4000, rate=50.0, seed=3, prefix_tokens=1024, share=0.5)
    share = sum(list(request.content[:2]) == [0, 1] for request in requests) / len(requests)
    assert share == pytest.approx(0.5, abs=0.03)
    assert requests[-1].arrival_s == pytest.approx(80.0, rel=0.1)
    own = [name for request in requests for name in request.content[2:]]
    assert len(own) == len(set(own))

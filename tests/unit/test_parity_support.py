"""The tools of the parity test on a GPU: a packed model, and what counts as a tie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phloem.shared.protocol.session import SamplingParams
from tests.support.model_pack import GROUP, MODEL_FILES, WEIGHTS_FILE, pack, unpack
from tests.support.parity import Case, Difference, ParityReference, Step, find_differences, table
from tests.support.reference import MAX_TOKENS
from tests.support.streams import Stream

PROMPT = [1, 2, 3]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    for name in MODEL_FILES:
        (tmp_path / name).write_text(json.dumps({"file": name}))
    generator = torch.Generator().manual_seed(0)
    weights = {
        "matrix": torch.randn(6, 2 * GROUP, generator=generator).to(torch.bfloat16),
        "norm": torch.randn(5, generator=generator).to(torch.bfloat16),
        "zeros": torch.zeros(2, GROUP, dtype=torch.bfloat16),
    }
    save_file(weights, tmp_path / WEIGHTS_FILE)
    return tmp_path


def test_unpacked_weights_are_within_half_a_step_and_files_are_the_same(
    model_dir: Path, tmp_path: Path
) -> None:
    unpack(pack(model_dir), tmp_path / "out")
    before, after = load_file(model_dir / WEIGHTS_FILE), load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert after.keys() == before.keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    assert torch.equal(after["norm"], before["norm"])
    assert not after["zeros"].any()
    groups, changed = before["matrix"].float().view(-1, GROUP), after["matrix"].float().view(-1, GROUP)
    largest = groups.abs().amax(dim=1)
    # The other end of the range is 7 steps away, so that its weights may lose a whole one; bfloat16 rounds.
    assert bool(((changed - groups).abs().amax(dim=1) <= largest / 8 * 1.02).all())
    at = groups.abs().argmax(dim=1, keepdim=True)
    torch.testing.assert_close(changed.gather(1, at), groups.gather(1, at), rtol=0.01, atol=0)
    for name in MODEL_FILES:
        assert (tmp_path / "out" / name).read_bytes() == (model_dir / name).read_bytes()


def test_packing_again_what_was_packed_changes_nothing(model_dir: Path, tmp_path: Path) -> None:
    """So that the reference and the host have the same weights."""
    unpack(pack(model_dir), tmp_path / "one")
    unpack(pack(model_dir), tmp_path / "two")
    one, two = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


class ScriptedEngine:
    """Answers with token 100 + index, but for `changes`: {(prompt, index): token}; notes what was asked."""

    def __init__(self, changes: dict[tuple[int, int], int]) -> None:
        self._changes = changes
        self._asked: dict[str, int] = {}
        self.calls: list[dict[str, int]] = []

    def submit(
        self, request_id: str, token_ids: list[int], num_prompt_tokens: int, sampling: SamplingParams
    ) -> None:
        assert token_ids[:num_prompt_tokens] == PROMPT
        done = token_ids[num_prompt_tokens:]
        assert done == [100 + at for at in range(len(done))], "it must go on from the reference's tokens"
        assert (sampling.temperature, sampling.max_tokens, sampling.ignore_eos) == (0.0, MAX_TOKENS, True)
        self._asked[request_id] = len(done)

    def run(self) -> dict[str, Stream]:
        self.calls.append(self._asked)
        streams = {
            name: Stream(
                start,
                [self._changes.get((int(name), at), 100 + at) for at in range(start, MAX_TOKENS)],
            )
            for name, start in self._asked.items()
        }
        self._asked = {}
        return streams


def reference(num_prompts: int) -> ParityReference:
    steps = [Step((100 + at, 7, 8), (5.0, 4.75, 1.0)) for at in range(MAX_TOKENS)]
    return ParityReference([Case(PROMPT, steps) for _ in range(num_prompts)], bfloat16_error=0.5)


def differences(engine: ScriptedEngine, num_prompts: int = 3) -> list[Difference]:
    return find_differences(engine, reference(num_prompts))


def test_equal_tokens_are_asked_for_once() -> None:
    engine = ScriptedEngine({})
    assert differences(engine) == []
    assert engine.calls == [{"0": 0, "1": 0, "2": 0}]


def test_after_a_difference_the_rest_is_compared_too() -> None:
    engine = ScriptedEngine({(1, 10): 7, (1, 20): 8, (2, MAX_TOKENS - 1): 9})
    assert differences(engine) == [
        Difference(1, 10, 110, 7, 0.25),
        Difference(2, MAX_TOKENS - 1, 100 + MAX_TOKENS - 1, 9, float("inf")),
        Difference(1, 20, 120, 8, 4.0),
    ]
    assert engine.calls == [{"0": 0, "1": 0, "2": 0}, {"1": 11}, {"1": 21}]


def test_table_shows_where_how_close_and_what_is_allowed() -> None:
    lines = table([Difference(1, 10, 110, 7, 0.25), Difference(2, 3, 5, 6, 0.75)], 0.5).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["2", "3", "5", "6", "0.7500", "0.5000", "WRONG"],
        ["1", "10", "110", "7", "0.2500", "0.5000", "tie"],
    ]
    assert table([], 0.5) == "no token differs"

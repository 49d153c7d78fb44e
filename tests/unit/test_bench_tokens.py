"""Token counts: the server's word, completed and checked with a tokenizer."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from phloem.shared.bench.record import RequestRecord
from phloem.shared.bench.token_check import check_tokens
from phloem.shared.bench.token_counter import TokenCounter
from phloem.shared.errors import ConfigError


@pytest.fixture
def counter(tmp_path: Path) -> TokenCounter:
    """Every word is a token."""
    vocab = {word: index for index, word in enumerate(["?", "red", "green", "blue"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return TokenCounter(tmp_path)


def record(
    pieces: list[str], *, output_tokens: int = -1, prompt_tokens: int = -1, expected: int = 0, error: str = ""
) -> RequestRecord:
    offsets = [0.05 + 0.01 * index for index in range(len(pieces))]
    return RequestRecord(
        target=0,
        block=0,
        session=0,
        turn=0,
        sent_s=0.0,
        ended_s=1.0,
        scheduled_s=0.0,
        max_tokens=9,
        output_tokens=output_tokens,
        prompt_tokens=prompt_tokens,
        expected_prompt_tokens=expected,
        chunk_offsets=array("d", offsets).tobytes(),
        finish_reason="length",
        error=error,
        pieces=pieces,
    )


def test_missing_counts_are_the_tokenizers(counter: TokenCounter) -> None:
    found = check_tokens([record(["red green", " blue"])], counter)
    assert found.records[0].output_tokens == 3
    assert list(found.records[0].tokens()) == [2, 1]
    assert found.retokenized == 3
    assert any("no usage" in remark for remark in found.remarks)


def test_the_servers_counts_are_kept_and_a_difference_is_told(counter: TokenCounter) -> None:
    found = check_tokens([record(["red", " green"], output_tokens=5)], counter)
    assert found.records[0].output_tokens == 5
    assert found.retokenized == 2
    assert "the server counts 5 output tokens, the tokenizer finds 2" in found.remarks[0]


def test_agreement_is_no_remark(counter: TokenCounter) -> None:
    known = record(["red", " green"], output_tokens=2, prompt_tokens=7, expected=6)
    found = check_tokens([known, record([], error="HTTP 503")], counter)
    assert found.remarks == []
    assert found.records[0] == known
    assert found.retokenized == 2


def test_prompts_of_another_length_than_made_are_told() -> None:
    records = [record(["red"], output_tokens=1, prompt_tokens=count, expected=6) for count in (6, 7, 9)]
    found = check_tokens(records, None)
    assert found.remarks == [
        "1 of 3 prompts have another length for the server than they were made with "
        "(the first: 9 instead of 6 tokens)"
    ]
    assert found.retokenized is None


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        TokenCounter(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="can't be read"):
        TokenCounter(tmp_path)

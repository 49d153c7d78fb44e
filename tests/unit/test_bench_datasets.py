"""What is sent: lengths, sharing, files."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from phloem.shared.bench.datasets.options import DatasetOptions
from phloem.shared.bench.datasets.registry import make_sessions
from phloem.shared.bench.lengths import LengthRange, parse_lengths
from phloem.shared.bench.prompt_source import DEFAULT_TOKEN_IDS, make_source
from phloem.shared.bench.session import PromptKind
from phloem.shared.bench.token_counter import TokenCounter
from phloem.shared.errors import ConfigError
from tests.support.bench_sessions import MOONCAKE, take

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2222830,5000,55
"""


def ids(added: bytes) -> list[int]:
    return msgspec.json.decode(b"[" + added.strip(b",") + b"]", type=list[int])


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    """A tokenizer that knows some words; others are several tokens: their letters."""
    words = ["Ġhouse", "Ġriver", "Ġstone", "Ġwind"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(letters + words)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=letters[0], continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_random_prompts_have_their_lengths_and_differ() -> None:
    options = DatasetOptions(input_lengths=LengthRange(5, 9), output_lengths=LengthRange(2, 4))
    sessions = take(options, 200)
    lengths = Counter(len(ids(session.turns[0].added)) for session in sessions)
    assert set(lengths) == {5, 6, 7, 8, 9}
    assert {session.turns[0].max_tokens for session in sessions} == {2, 3, 4}
    assert all(session.turns[0].num_added_tokens == len(ids(session.turns[0].added)) for session in sessions)
    assert len({session.turns[0].added for session in sessions}) == 200
    assert all(token in DEFAULT_TOKEN_IDS for session in sessions for token in ids(session.turns[0].added))


@pytest.mark.parametrize("name", ["random", "shared-prefix", "multi-turn"])
@pytest.mark.parametrize("kind", ["tokens", "text", "messages"])
def test_equal_seeds_make_equal_sessions(name: Any, kind: PromptKind) -> None:
    options = DatasetOptions(name=name, num_turns=2, prefix_tokens=20, input_lengths=LengthRange(4, 8))
    assert take(options, 10, kind) == take(options, 10, kind)
    assert take(options, 10, kind)[0].turns != take(options, 10, kind, seed=1)[0].turns


def test_shared_prefixes_are_shared_within_groups_by_zipf() -> None:
    options = DatasetOptions(
        name="shared-prefix", num_groups=4, prefix_tokens=30, input_lengths=LengthRange(5, 5), zipf=1.0
    )
    sessions = take(options, 2000)
    groups = Counter(tuple(ids(session.turns[0].added)[:30]) for session in sessions)
    assert len(groups) == 4
    total = 1 + 1 / 2 + 1 / 3 + 1 / 4
    shares = [count / 2000 for _, count in groups.most_common()]
    assert shares == pytest.approx([1 / rank / total for rank in (1, 2, 3, 4)], abs=0.04)
    assert {session.turns[0].num_added_tokens for session in sessions} == {35}
    assert {len(ids(session.turns[0].added)) for session in sessions} == {35}


def test_chat_prefix_is_a_system_message() -> None:
    options = DatasetOptions(name="shared-prefix", num_groups=1, prefix_tokens=3)
    added = take(options, 1, "messages")[0].turns[0].added
    assert [message["role"] for message in json.loads(b"[" + added + b"]")] == ["system", "user"]


def test_conversations_have_stubs_as_long_as_answers() -> None:
    options = DatasetOptions(name="multi-turn", num_turns=3, think_s=0.5, output_lengths=LengthRange(7, 7))
    turns = take(options, 1)[0].turns
    assert [len(ids(turn.stub)) for turn in turns] == [7, 7, 7]
    assert [turn.think_s for turn in turns] == [0.0, 0.5, 0.5]


def test_words_are_exact_with_a_tokenizer(tokenizer_dir: Path) -> None:
    counter = TokenCounter(tokenizer_dir)
    options = DatasetOptions(input_lengths=LengthRange(50, 50))
    sessions = list(itertools.islice(make_sessions(options, make_source("text", counter), 0, counter), 5))
    for session in sessions:
        assert session.turns[0].num_added_tokens == 50
        assert counter.count(json.loads(b'"' + session.turns[0].added + b'"')) == 50


def test_words_without_a_tokenizer_have_no_known_length() -> None:
    assert take(DatasetOptions(), 1, "text")[0].turns[0].num_added_tokens == 0


def test_control_tokens_are_never_drawn(tokenizer_dir: Path) -> None:
    counter = TokenCounter(tokenizer_dir)
    assert len(counter.ordinary_ids()) == 256 + 4
    assert max(counter.ordinary_ids()) == 259  # <|end|> is 260


def test_mooncake_equal_hash_ids_are_equal_blocks(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in MOONCAKE))
    options = DatasetOptions(name="trace", path=str(path), time_scale=0.5)
    first, second, third = take(options, 9)
    prompts = [ids(session.turns[0].added) for session in (first, second, third)]
    assert [len(prompt) for prompt in prompts] == [1100, 700, 600]
    assert prompts[0][:512] == prompts[1][:512] == prompts[2][:512]
    assert prompts[0][512:700] != prompts[1][512:]
    assert [session.start_s for session in (first, second, third)] == [0, 1.0, 1.5]
    assert [session.turns[0].max_tokens for session in (first, second, third)] == [50, 3, 9]
    assert first.turns[0].num_added_tokens == 1100


def test_azure_rows_have_their_lengths_and_times(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    sessions = take(DatasetOptions(name="trace", path=str(path), max_input_tokens=1000), 9)
    assert [len(ids(session.turns[0].added)) for session in sessions] == [374, 396]
    assert [session.turns[0].max_tokens for session in sessions] == [44, 109]
    assert [session.start_s for session in sessions] == pytest.approx([0, 4.314579])


def test_sharegpt_takes_questions_and_recorded_lengths(tmp_path: Path, tokenizer_dir: Path) -> None:
    talk = [
        {"from": "human", "value": " house river stone wind"},
        {"from": "gpt", "value": " wind" * 9},
        {"from": "human", "value": " stone" * 5},
        {"from": "gpt", "value": " wind" * 4},
    ]
    short = [{"from": "human", "value": " house"}, {"from": "gpt", "value": " wind" * 9}]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"id": "1", "conversations": talk}, {"conversations": short}]))
    counter = TokenCounter(tokenizer_dir)
    options = DatasetOptions(name="sharegpt", path=str(path), num_turns=2)
    sessions = list(make_sessions(options, make_source("messages", counter), 0, counter))
    assert [[turn.max_tokens for turn in session.turns] for session in sessions] == [[9, 4]]
    assert json.loads(sessions[0].turns[0].added) == {"role": "user", "content": talk[0]["value"]}
    with pytest.raises(ConfigError, match="--tokenizer"):
        next(make_sessions(options, make_source("messages", None), 0))


def test_jsonl_rows_of_each_kind(tmp_path: Path) -> None:
    rows = [
        {"prompt": 'say "hi"', "max_tokens": 5},
        {"prompt": [1, 2, 3], "output_length": 7},
        {"messages": [{"role": "user", "content": "x"}], "timestamp": 2.5},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    text, tokens, chat = take(DatasetOptions(name="jsonl", path=str(path), time_scale=2), 9, "text")
    assert (text.kind, text.turns[0].added, text.turns[0].max_tokens) == ("text", rb"say \"hi\"", 5)
    assert (tokens.kind, ids(tokens.turns[0].added), tokens.turns[0].max_tokens) == ("tokens", [1, 2, 3], 7)
    assert (chat.kind, chat.start_s) == ("messages", 5.0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trace", '{"timestamp": 0}', "line 1"),
        ("trace", "a,b\n1,2\n", "row 1"),
        ("jsonl", "{}", "no prompt"),
        ("jsonl", "nonsense", "line 1"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, name: Any, content: str, message: str) -> None:
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        take(DatasetOptions(name=name, path=str(path)), 1)


def test_missing_files_are_refused() -> None:
    with pytest.raises(ConfigError, match="--dataset-path FILE"):
        take(DatasetOptions(name="jsonl"), 1)
    with pytest.raises(ConfigError, match="no file /nowhere"):
        take(DatasetOptions(name="trace", path="/nowhere"), 1)


@pytest.mark.parametrize("text", ["0", "5:2", "a", "-3", "1:2:3"])
def test_bad_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--input-len"):
        parse_lengths(text, "--input-len")

"""Prompts from local files: ShareGPT's JSON, and one request per line."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from phloem.shared.bench.datasets.options import DatasetOptions, session_rng
from phloem.shared.bench.prompt_source import PromptSource
from phloem.shared.bench.session import PromptKind, Session, Turn, message_json, text_json, tokens_json
from phloem.shared.bench.token_counter import TokenCounter
from phloem.shared.errors import ConfigError

T = TypeVar("T")

# SGLang's bench_serving leaves out exchanges that are shorter than this on either side.
_FEWEST_TOKENS = 4


class _Said(msgspec.Struct):
    speaker: str = msgspec.field(name="from", default="")
    value: str = ""


class _Conversation(msgspec.Struct):
    conversations: list[_Said] = []
    conversation: list[_Said] = []

    def exchanges(self) -> Iterator[tuple[str, str]]:
        """(question, recorded answer) in order."""
        said = self.conversations or self.conversation
        for asked, answered in zip(said[::2], said[1::2], strict=False):
            yield asked.value, answered.value


class _Row(msgspec.Struct):
    prompt: str | list[int] | None = None
    input_ids: list[int] | None = None
    messages: list[msgspec.Raw] | None = None
    max_tokens: int | None = None
    output_length: int | None = None
    timestamp: float | None = None  # seconds


def sharegpt_sessions(
    options: DatasetOptions, source: PromptSource, seed: int, counter: TokenCounter | None
) -> Iterator[Session]:
    """Conversations in shuffled order, the first `num_turns` exchanges of each; the recorded answer gives
    the output length (which takes a tokenizer, or --output-len). The server's own answers, not the
    recorded ones, go into later prompts.

    Exchanges of under four tokens on a side and prompts over `max_input_tokens` are left out. Raises
    `ConfigError` for a file of another shape.
    """
    if counter is None and options.output_lengths is None:
        raise ConfigError("--dataset sharegpt needs --tokenizer to measure recorded answers, or --output-len")
    if source.kind == "tokens":
        raise ConfigError("--dataset sharegpt is text: use --prompt-as text, or the chat API")
    conversations = _decode(
        options.required_path().read_bytes(), list[_Conversation], options.required_path()
    )
    random.Random(seed).shuffle(conversations)
    for index, conversation in enumerate(conversations):
        rng = session_rng(seed, "sharegpt", index)
        turns = tuple(_sharegpt_turns(options, source.kind, conversation, counter, rng))
        if turns:
            yield Session(index, source.kind, turns)


def _sharegpt_turns(
    options: DatasetOptions,
    kind: PromptKind,
    conversation: _Conversation,
    counter: TokenCounter | None,
    rng: random.Random,
) -> Iterator[Turn]:
    total = 0
    for number, (asked, answered) in enumerate(conversation.exchanges()):
        num_input = counter.count(asked) if counter else 0
        num_output = counter.count(answered) if counter else None
        too_short = counter is not None and min(num_input, num_output or 0) < _FEWEST_TOKENS
        total += num_input + (num_output or 0)
        if number == options.num_turns or not asked or too_short or not options.fits(total):
            return
        yield Turn(
            added=message_json("user", asked) if kind == "messages" else text_json(asked),
            max_tokens=options.output_tokens(rng, num_output),
            num_added_tokens=num_input if kind == "text" else 0,
            think_s=options.think_s if number else 0.0,
        )


def jsonl_sessions(options: DatasetOptions, source: PromptSource, seed: int) -> Iterator[Session]:
    """One request per line: `prompt` (text or token ids), `input_ids` or `messages`; with `max_tokens` or
    `output_length`, and `timestamp` (seconds) where it has one. A text prompt goes to the chat API as one
    user message. Raises `ConfigError` for a line that can't be read."""
    path = options.required_path()
    with path.open("rb") as lines:
        for index, line in enumerate(lines):
            if not line.strip():
                continue
            row = _decode(line, _Row, path, index + 1)
            kind, added, num_tokens = _row_prompt(row, source.kind, f"{path}, line {index + 1}")
            recorded = row.max_tokens if row.max_tokens is not None else row.output_length
            max_tokens = options.output_tokens(session_rng(seed, "jsonl", index), recorded)
            start_s = -1.0 if row.timestamp is None else row.timestamp * options.time_scale
            yield Session(index, kind, (Turn(added, max_tokens, num_tokens),), start_s)


def _row_prompt(row: _Row, wanted: PromptKind, where: str) -> tuple[PromptKind, bytes, int]:
    ids: Sequence[int] | None = row.prompt if isinstance(row.prompt, list) else row.input_ids
    if row.messages:
        return "messages", b",".join(bytes(message) for message in row.messages), 0
    if ids:
        return "tokens", tokens_json(ids), len(ids)
    if isinstance(row.prompt, str) and row.prompt:
        if wanted == "messages":
            return "messages", message_json("user", row.prompt), 0
        return "text", text_json(row.prompt), 0
    raise ConfigError(f"{where}: there is no prompt, input_ids or messages")


def _decode(data: bytes, kind: type[T], path: Path, line: int | None = None) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        where = f"{path}, line {line}" if line else str(path)
        raise ConfigError(f"{where}: {error}") from error

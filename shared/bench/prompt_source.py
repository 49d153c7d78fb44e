"""Content of a wanted length: token ids, plain text or chat messages."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from phloem.shared.bench.session import PromptKind, message_json, text_json, tokens_json
from phloem.shared.bench.token_counter import TokenCounter
from phloem.shared.bench.words import WORDS

# Ids that are ordinary tokens in every common vocabulary: past the control tokens and single bytes.
DEFAULT_TOKEN_IDS = range(1000, 30_000)


class Piece(NamedTuple):
    """Content as JSON, and its number of tokens: 0 when that isn't known."""

    json: bytes
    num_tokens: int


class PromptSource(Protocol):
    """Makes random content; equal states of `rng` make equal content."""

    @property
    def kind(self) -> PromptKind: ...

    def make(self, rng: random.Random, num_tokens: int, role: str = "user") -> Piece:
        """`role` matters for messages only."""
        ...


class TokenIds:
    """Random token ids: exact on every server that takes ids."""

    kind: PromptKind = "tokens"

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = ids

    def make(self, rng: random.Random, num_tokens: int, role: str = "user") -> Piece:
        return Piece(tokens_json(rng.choices(self._ids, k=num_tokens)), num_tokens)


class Words:
    """Random English words. With a tokenizer only those that are one token each, so that the length is
    exact (verified per text); without one the length is near, and only the server can tell it."""

    kind: PromptKind = "text"

    def __init__(self, counter: TokenCounter | None) -> None:
        self._counter = counter
        single = [word for word in WORDS if counter is not None and counter.count(" " + word) == 1]
        self._words = single if len(single) > 1 else WORDS

    def text(self, rng: random.Random, num_tokens: int) -> str:
        return "".join(f" {word}" for word in rng.choices(self._words, k=num_tokens))

    def make(self, rng: random.Random, num_tokens: int, role: str = "user") -> Piece:
        text = self.text(rng, num_tokens)
        return Piece(text_json(text), self._counter.count(text) if self._counter is not None else 0)


class Messages:
    """Random words as chat messages. The chat template adds tokens, so only the server knows the length."""

    kind: PromptKind = "messages"

    def __init__(self, words: Words) -> None:
        self._words = words

    def make(self, rng: random.Random, num_tokens: int, role: str = "user") -> Piece:
        return Piece(message_json(role, self._words.text(rng, num_tokens).strip()), 0)


def make_source(
    kind: PromptKind, counter: TokenCounter | None, token_ids: Sequence[int] | None = None
) -> PromptSource:
    """The source of `kind`; `token_ids` (default: the tokenizer's ordinary ones, or 1,000 to 29,999) are
    the ids to draw from."""
    match kind:
        case "tokens":
            return TokenIds(token_ids or (counter.ordinary_ids() if counter else DEFAULT_TOKEN_IDS))
        case "text":
            return Words(counter)
        case "messages":
            return Messages(Words(counter))

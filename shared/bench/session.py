"""What is sent: conversations of one or more turns, as ready-made pieces of JSON.

The pieces are encoded before they reach the measuring process, which only joins them: no token id is ever
formatted between two reads of the clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

import msgspec

PromptKind: TypeAlias = Literal["tokens", "text", "messages"]


class Turn(msgspec.Struct, frozen=True):
    """What one turn adds to the conversation's prompt, and how much it asks for.

    `added` is JSON without its outer brackets or quotes: `1,2,3` (tokens), escaped text, or message objects.
    `num_added_tokens` is the number of tokens in it where the dataset knows it, else 0. `think_s` passes
    between the end of the turn before and this one. `stub` stands for the answer in later prompts of kind
    "tokens" when the server doesn't say which tokens it made.
    """

    added: bytes
    max_tokens: int
    num_added_tokens: int = 0
    think_s: float = 0.0
    stub: bytes = b""


class Session(msgspec.Struct, frozen=True):
    """A conversation: its turns are sent one after the other. `start_s` is its arrival in seconds after the
    start of its block; negative: as soon as there is a free place (closed loop)."""

    session_id: int
    kind: PromptKind
    turns: tuple[Turn, ...]
    start_s: float = -1.0

    @property
    def num_bytes(self) -> int:
        return sum(len(turn.added) + len(turn.stub) for turn in self.turns)


def tokens_json(token_ids: Iterable[int]) -> bytes:
    """The ids as they stand between the brackets of a JSON list."""
    return ",".join(map(str, token_ids)).encode()


def text_json(text: str) -> bytes:
    """The text as it stands between the quotes of a JSON string."""
    return msgspec.json.encode(text)[1:-1]


def message_json(role: str, content: str) -> bytes:
    """One chat message."""
    return msgspec.json.encode({"role": role, "content": content})


def join_pieces(kind: PromptKind, pieces: Sequence[bytes]) -> bytes:
    """The pieces of a conversation as one prompt, still without brackets or quotes."""
    return (b"" if kind == "text" else b",").join(pieces)

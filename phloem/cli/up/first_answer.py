"""The question that `phloem up` asks its own cluster, so that the user sees it work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple

from phloem.cli.chat_client import ChatClient
from phloem.shared.errors import PhloemError

QUESTION = "What is the capital of France?"
_MAX_TOKENS = 64
_RETRY_S = 0.2


class Answer(NamedTuple):
    text: str
    first_token_s: float
    total_s: float


async def first_answer(url: str, model: str, api_key: str, timeout_s: float) -> Answer:
    """The cluster's greedy answer to `QUESTION`.

    Tries again while the gateway has not heard of its workers yet. Raises `PhloemError` after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        client = ChatClient(url, api_key=api_key, timeout_s=timeout_s)
        try:
            return await asyncio.to_thread(_ask, client, model, time.monotonic)
        except PhloemError as error:
            if not error.retryable or time.monotonic() + _RETRY_S > deadline:
                raise
        await asyncio.sleep(_RETRY_S)


def _ask(client: ChatClient, model: str, clock: Callable[[], float]) -> Answer:
    started = clock()
    first_s = 0.0
    pieces = []
    messages = [{"role": "user", "content": QUESTION}]
    for piece in client.stream(model, messages, temperature=0, max_tokens=_MAX_TOKENS):
        first_s = first_s or clock() - started
        pieces.append(piece)
    return Answer("".join(pieces).strip(), first_s, clock() - started)

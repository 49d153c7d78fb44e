"""Runs the sequences of a request and answers, whole or as a stream, in the words of one API."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Protocol

from phloem.services.gateway.api.exchange import Reply
from phloem.services.gateway.gateway import Gateway
from phloem.services.gateway.sequence import RunningSequence, TextDelta

DONE = b"[DONE]"


class Dialect(Protocol):
    """How one API says things. Every method returns JSON."""

    def chunks(self, sequence: RunningSequence, delta: TextDelta) -> list[bytes]:
        """The events for one addition; none when there is nothing to say."""
        ...

    def closing(self, sequences: Sequence[RunningSequence]) -> list[bytes]:
        """The events after the last addition, before `[DONE]`."""
        ...

    def whole(self, sequences: Sequence[RunningSequence]) -> bytes:
        """The answer of a request that doesn't stream."""
        ...


async def answer(
    gateway: Gateway, sequences: Sequence[RunningSequence], dialect: Dialect, reply: Reply, *, stream: bool
) -> None:
    """Raises `PhloemError`, also when events have been sent already."""

    def say(sequence: RunningSequence, delta: TextDelta) -> Awaitable[None]:
        return reply.events(dialect.chunks(sequence, delta))

    try:
        await gateway.run(sequences, say if stream else _ignore)
        if stream:
            await reply.events([*dialect.closing(sequences), DONE])
            await reply.end()
        else:
            await reply.json(dialect.whole(sequences))
    finally:
        reply.log_fields["prompt_tokens"] = sum(len(one.request.token_ids) for one in sequences)
        reply.log_fields["generated_tokens"] = sum(one.num_generated_tokens for one in sequences)


async def _ignore(sequence: RunningSequence, delta: TextDelta) -> None:
    """A whole answer is made from the sequences themselves."""

"""Runs the sequences of a request and answers, whole or as a stream, in the words of one API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from msgspec import Struct

from phloem.services.gateway.api.exchange import Exchange, Reply
from phloem.services.gateway.call import Call
from phloem.services.gateway.gateway import Gateway
from phloem.services.gateway.sampling import SamplingPlan
from phloem.services.gateway.sequence import RunningSequence, TextDelta
from phloem.shared.errors import PhloemError

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


class Job(Struct, frozen=True, kw_only=True):
    """What a route makes of a request's body.

    `encode` gives the token ids of its `num_prompts` prompts, which `param` names in errors; the other fields
    are as in `Gateway.sequences`.
    """

    sampling: SamplingPlan
    num_prompts: int
    encode: Callable[[], Awaitable[list[list[int]]]]
    param: str
    cache_salt: str | None
    continues_text: bool
    default_max_tokens: int = 0
    dialect: Dialect
    stream: bool


def answering(gateway: Gateway, call: Call, job: Job) -> Exchange:
    """The exchange that does `job`, if there is room for it. It raises `PhloemError`, also when events have
    been sent already."""

    async def work(reply: Reply) -> None:
        with gateway.admission.admit(call.tenant.id, job.sampling.n * job.num_prompts):
            sequences = gateway.sequences(
                call,
                await job.encode(),
                job.sampling,
                cache_salt=job.cache_salt,
                param=job.param,
                continues_text=job.continues_text,
                default_max_tokens=job.default_max_tokens,
            )
            reply.log_fields["prompt_tokens"] = sum(len(one.request.token_ids) for one in sequences)
            try:
                await (_stream if job.stream else _whole)(gateway, sequences, job.dialect, reply)
            except PhloemError as error:
                raise job.sampling.naming_field(error) from error.__cause__
            finally:
                reply.log_fields["generated_tokens"] = sum(one.num_generated_tokens for one in sequences)

    return Exchange(work, last_word_s=gateway.deadline_slack_s)


async def _stream(
    gateway: Gateway, sequences: Sequence[RunningSequence], dialect: Dialect, reply: Reply
) -> None:
    def say(sequence: RunningSequence, delta: TextDelta) -> Awaitable[None]:
        return reply.events(dialect.chunks(sequence, delta))

    await gateway.run(sequences, say)
    await reply.events([*dialect.closing(sequences), DONE])
    await reply.end()


async def _whole(
    gateway: Gateway, sequences: Sequence[RunningSequence], dialect: Dialect, reply: Reply
) -> None:
    await gateway.run(sequences, _ignore)
    await reply.json(dialect.whole(sequences))


async def _ignore(sequence: RunningSequence, delta: TextDelta) -> None:
    """A whole answer is made from the sequences themselves."""

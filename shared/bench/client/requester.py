"""Sends one request to one target and records what was seen."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from phloem.shared.bench.client.connection import Connection, ConnectionBroken, Inbox
from phloem.shared.bench.client.dialect import RequestWriter, error_text
from phloem.shared.bench.client.observer import StreamObserver, TokenTally
from phloem.shared.bench.client.pool import ConnectionPool, Endpoint
from phloem.shared.bench.protocol import TargetSpec
from phloem.shared.bench.record import RequestRecord
from phloem.shared.bench.session import PromptKind


class Ask(NamedTuple):
    """One request: its prompt and where it belongs in the run."""

    kind: PromptKind
    pieces: Sequence[bytes]
    max_tokens: int
    scheduled_s: float
    block: int = 0
    session: int = 0
    turn: int = 0
    expected_prompt_tokens: int = 0
    is_warmup: bool = False

    @property
    def request_id(self) -> str:
        """What the server's logs and traces call it (header x-request-id)."""
        return f"bench-{self.block}-{self.session}-{self.turn}"


class Answer(NamedTuple):
    """The record, and what a later turn repeats of the answer."""

    record: RequestRecord
    text: str
    token_ids: Sequence[int]


class _Attempt:
    """What became of the transport: filled in while the request runs, read whatever ends it."""

    def __init__(self, observer: StreamObserver, sent_s: float) -> None:
        self.observer = observer
        self.sent_s = sent_s
        self.status = 0
        self.error = ""
        self.connect_s = 0.0
        self.resent = False


class Requester:
    """Asks one target. `index` is the target's number in the records."""

    def __init__(
        self, index: int, spec: TargetSpec, inbox: Inbox, *, timeout_s: float, keep_pieces: bool
    ) -> None:
        endpoint = Endpoint(spec.url)
        self._index = index
        self._spec = spec
        self._pool = ConnectionPool(endpoint, inbox)
        self._writer = RequestWriter(spec, endpoint.authority, endpoint.path)
        self._timeout_s = timeout_s
        self._keep_pieces = keep_pieces
        self.tally = TokenTally()

    async def ask(self, ask: Ask, *, keep_answer: bool = False) -> Answer:
        """Never raises for what the server does: that is in the record. `keep_answer` keeps the text for a
        later turn."""
        observer = StreamObserver(self._spec.api, self.tally, keep_pieces=self._keep_pieces or keep_answer)
        payload = self._writer.request(ask.request_id, ask.kind, ask.pieces, ask.max_tokens)
        attempt = _Attempt(observer, time.monotonic())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(payload, attempt)
        except TimeoutError:
            attempt.error = f"no complete answer within {self._timeout_s:g} s"
        except (ConnectionBroken, OSError) as error:
            attempt.error = f"connection: {error}"
        return Answer(self._record(ask, attempt), observer.text, observer.token_ids)

    def close(self) -> None:
        self._pool.close()

    async def _exchange(self, payload: bytes, attempt: _Attempt) -> None:
        """On a kept-alive connection that the server had just given up, once more on a new one."""
        connection = self._pool.take_idle()
        if connection is not None:
            try:
                return await self._on(connection, payload, attempt)
            except ConnectionBroken as error:
                if not error.before_answer:
                    raise
                attempt.resent = True
        connection = await self._pool.open()
        attempt.connect_s = time.monotonic() - attempt.sent_s
        await self._on(connection, payload, attempt)

    async def _on(self, connection: Connection, payload: bytes, attempt: _Attempt) -> None:
        try:
            attempt.status = await connection.exchange(payload, attempt.observer)
        except BaseException:
            connection.close()
            raise
        if attempt.status != 200:
            attempt.error = f"HTTP {attempt.status}: {error_text(connection.error_body)}"
        self._pool.give_back(connection)

    def _record(self, ask: Ask, attempt: _Attempt) -> RequestRecord:
        seen = attempt.observer
        return RequestRecord(
            target=self._index,
            block=ask.block,
            session=ask.session,
            turn=ask.turn,
            sent_s=attempt.sent_s,
            ended_s=seen.last_event_s if seen.last_event_s else time.monotonic(),
            scheduled_s=ask.scheduled_s,
            max_tokens=ask.max_tokens,
            expected_prompt_tokens=ask.expected_prompt_tokens,
            prompt_tokens=seen.prompt_tokens,
            output_tokens=seen.output_tokens,
            cached_tokens=seen.cached_tokens,
            chunk_offsets=array("d", [stamp - attempt.sent_s for stamp in seen.stamps]).tobytes(),
            chunk_tokens=seen.chunk_tokens(),
            finish_reason=seen.finish_reason,
            status=attempt.status,
            error=attempt.error or seen.problem(),
            connect_s=attempt.connect_s,
            resent=attempt.resent,
            is_warmup=ask.is_warmup,
            pieces=seen.pieces if self._keep_pieces else [],
        )

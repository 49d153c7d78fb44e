"""Runs one block: the sessions of one target, under one load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from phloem.shared.bench.client.lag import LagMeter
from phloem.shared.bench.client.requester import Answer, Ask, Requester
from phloem.shared.bench.protocol import SessionBatch, StartBlock
from phloem.shared.bench.record import RequestRecord
from phloem.shared.bench.session import PromptKind, Session, Turn, message_json, text_json, tokens_json


class Counters:
    """What the progress line shows."""

    def __init__(self) -> None:
        self.sent = self.succeeded = self.failed = self.in_flight = 0

    def ended(self, record: RequestRecord) -> None:
        self.in_flight -= 1
        if record.succeeded:
            self.succeeded += 1
        else:
            self.failed += 1


class BlockRunner:
    """Sends a block's sessions as its load says and collects their records.

    `on_credit` is awaited each time all sessions of a batch were begun.
    """

    def __init__(
        self,
        start: StartBlock,
        requester: Requester,
        lag: LagMeter,
        counters: Counters,
        on_credit: Callable[[], Awaitable[None]],
    ) -> None:
        self._start = start
        self._requester = requester
        self._lag = lag
        self._counters = counters
        self._on_credit = on_credit
        self._batches: asyncio.Queue[SessionBatch] = asyncio.Queue()
        self._next: list[Session] = []  # of the batch being sent, reversed
        self._is_last_batch = False
        self._is_stopped = False
        self._fetching = asyncio.Lock()
        self._records: list[RequestRecord] = []
        self._start_at: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._started_s = 0.0

    def begin(self, start_at: float) -> None:
        """Sets the time zero of the block."""
        self._start_at.set_result(start_at)

    def add(self, batch: SessionBatch) -> None:
        self._batches.put_nowait(batch)

    def stop(self) -> None:
        """Begins nothing new."""
        self._is_stopped = True
        self.add(SessionBatch(self._start.block, [], is_last=True))

    def take_records(self) -> list[RequestRecord]:
        """Those that were made since the last call."""
        records, self._records = self._records, []
        return records

    async def run(self) -> None:
        """Returns when every request that was begun has ended."""
        self._started_s = await self._start_at
        await _sleep_until(self._started_s)
        first = await self._take()
        if first is None:
            return
        if first.start_s >= 0:
            await self._run_open(first)
        else:
            await self._run_closed(first)

    # closed loop

    async def _run_closed(self, first: Session) -> None:
        places = max(self._start.concurrency, 1)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._fill_place(0.0, first))
            for place in range(1, places):
                group.create_task(self._fill_place(self._opening_s(place), None))

    def _opening_s(self, place: int) -> float:
        """When the place opens, in seconds after the start."""
        start = self._start
        grown = max(place - max(start.initial_concurrency, 1) + 1, 0)
        num_grown = max(start.concurrency - max(start.initial_concurrency, 1), 1)
        return start.ramp_s * grown / num_grown

    async def _fill_place(self, opening_s: float, session: Session | None) -> None:
        await _sleep_until(self._started_s + opening_s)
        while (session := session or await self._take()) is not None and not self._is_over():
            await self._converse(session, time.monotonic())
            session = None

    # open loop

    async def _run_open(self, session: Session | None) -> None:
        limit = asyncio.Semaphore(self._start.concurrency) if self._start.concurrency else None
        async with asyncio.TaskGroup() as group:
            while session is not None and not self._is_over():
                due = self._started_s + session.start_s
                await _sleep_until(due)
                if self._is_over():
                    return
                self._lag.note_dispatch(time.monotonic() - due)
                group.create_task(self._limited(limit, session, due))
                session = await self._take()

    async def _limited(self, limit: asyncio.Semaphore | None, session: Session, due: float) -> None:
        if limit is None:
            await self._converse(session, due)
            return
        async with limit:
            await self._converse(session, due)

    # one session

    async def _converse(self, session: Session, due: float) -> None:
        """The turns one after the other; after a failed one the rest can't be asked and fails too."""
        pieces: list[bytes] = []
        num_tokens = 0
        for index, turn in enumerate(session.turns):
            if index:
                due = time.monotonic() + turn.think_s
                await _sleep_until(due)
                if self._is_over():
                    return
            pieces.append(turn.added)
            num_tokens += turn.num_added_tokens
            is_last = index + 1 == len(session.turns)
            answer = await self._ask(session, index, pieces, due, num_tokens, keep_answer=not is_last)
            if not answer.record.succeeded:
                self._skip(session, index + 1, answer.record)
                return
            if not is_last:
                pieces.append(_answer_piece(session.kind, turn, answer))
                num_tokens += max(answer.record.output_tokens, 0) or turn.max_tokens

    async def _ask(
        self,
        session: Session,
        index: int,
        pieces: list[bytes],
        due: float,
        num_tokens: int,
        *,
        keep_answer: bool,
    ) -> Answer:
        turn = session.turns[index]
        known = num_tokens if all(turn.num_added_tokens for turn in session.turns[: index + 1]) else 0
        ask = Ask(
            kind=session.kind,
            pieces=pieces,
            max_tokens=turn.max_tokens,
            scheduled_s=due,
            block=self._start.block,
            session=session.session_id,
            turn=index,
            expected_prompt_tokens=known,
            is_warmup=self._start.is_warmup,
        )
        self._counters.sent += 1
        self._counters.in_flight += 1
        answer = await self._requester.ask(ask, keep_answer=keep_answer)
        self._keep(answer.record)
        return answer

    def _keep(self, record: RequestRecord) -> None:
        self._counters.ended(record)
        self._records.append(record)

    def _skip(self, session: Session, from_turn: int, failed: RequestRecord) -> None:
        for index in range(from_turn, len(session.turns)):
            self._counters.sent += 1
            self._counters.in_flight += 1
            self._keep(
                RequestRecord(
                    target=failed.target,
                    block=failed.block,
                    session=session.session_id,
                    turn=index,
                    sent_s=failed.ended_s,
                    ended_s=failed.ended_s,
                    scheduled_s=failed.ended_s,
                    max_tokens=session.turns[index].max_tokens,
                    error="not sent: an earlier turn failed",
                    is_warmup=failed.is_warmup,
                )
            )

    # sessions as they come

    async def _take(self) -> Session | None:
        """The next session; None when there are no more, or the block was stopped."""
        async with self._fetching:
            while not self._next:
                if self._is_last_batch or self._is_stopped:
                    return None
                batch = await self._batches.get()
                self._next = batch.sessions[::-1]
                self._is_last_batch = batch.is_last
            session = self._next.pop()
            if not self._next and not self._is_last_batch:
                await self._on_credit()
            return None if self._is_stopped else session

    def _is_over(self) -> bool:
        start = self._start
        is_late = start.duration_s > 0 and time.monotonic() >= self._started_s + start.duration_s
        return self._is_stopped or is_late


def _answer_piece(kind: PromptKind, turn: Turn, answer: Answer) -> bytes:
    """The answer as the next prompt repeats it."""
    match kind:
        case "messages":
            return message_json("assistant", answer.text)
        case "text":
            return text_json(answer.text)
        case "tokens":
            return tokens_json(answer.token_ids) if answer.token_ids else turn.stub


async def _sleep_until(due: float) -> None:
    """Never returns before `due`, as the loop's timers may: they count whole milliseconds, from a time that
    the loop read up to one before."""
    while (delay := due - time.monotonic()) > 0:  # noqa: ASYNC110 - what is awaited is a time
        await asyncio.sleep(delay)

"""Random schedules of pieces, cancels, Lasts and releases over a live channel, against a model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phloem.shared.protocol.transfer import Cancel, Last, Ready
from phloem.shared.transfer.events import (
    CancelReceived,
    LastReceived,
    PieceReceived,
    ReadyReceived,
    SlotAvailable,
)
from tests.support.transfer import DECODE, NUM_SLOTS, PREFILL, Pair, joined, piece

steps = st.lists(
    st.one_of(
        st.tuples(st.just("piece"), st.integers(1, 3000)),
        st.tuples(st.just("last"), st.just(0)),
        st.tuples(st.just("cancel"), st.just(0)),
        st.tuples(st.just("cancel_back"), st.just(0)),
        st.tuples(st.just("release"), st.integers(0, NUM_SLOTS - 1)),
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with joined() as pair:
        yield pair


Sent: TypeAlias = Last | Cancel | tuple[int, int]  # a piece: its number, its bytes


class Run:
    """One schedule; the model is what was sent and not seen yet."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.sent: deque[Sent] = deque()
        self.held: list[PieceReceived] = []
        self.num_outstanding = 0
        self.number = 0

    def step(self, action: str, argument: int) -> None:
        self.number += 1
        match action:
            case "piece":
                self.send_piece(argument)
            case "last":
                self.sent.append(Last("r", 1, self.number, [self.number]))
                self.pair.prefill.endpoint.send_last(DECODE, Last("r", 1, self.number, [self.number]))
            case "cancel":
                self.sent.append(Cancel("r", self.number))
                self.pair.prefill.endpoint.send_cancel(DECODE, Cancel("r", self.number), "prefill")
            case "cancel_back":
                self.pair.decode.endpoint.send_cancel(PREFILL, Cancel("r", self.number), "decode")
                assert self.pair.prefill.next_of(CancelReceived).message.attempt == self.number
            case "release":
                self.receive_all()
                if self.held:
                    self.release(argument % len(self.held))

    def send_piece(self, num_bytes: int) -> None:
        if self.num_outstanding == NUM_SLOTS:
            assert self.pair.prefill.endpoint.acquire_slot(DECODE) is None
            return
        while not self.pair.send(piece("r", self.number, num_bytes), self.number % 256):
            self.pair.prefill.next_of(SlotAvailable)
        self.num_outstanding += 1
        self.sent.append((self.number, num_bytes))

    def receive_all(self) -> None:
        while self.sent:
            self.receive(self.sent.popleft())

    def receive(self, expected: Sent) -> None:
        match expected:
            case Last():
                assert self.pair.decode.next(LastReceived).message == expected
            case Cancel():
                assert self.pair.decode.next(CancelReceived).message == expected
            case (number, num_bytes):
                received = self.pair.decode.next(PieceReceived)
                assert received.header == piece("r", number, num_bytes)
                assert received.data.numel() == num_bytes
                self.held.append(received)

    def release(self, index: int) -> None:
        """Other pieces that are held keep their bytes; the credit has arrived when the fence has."""
        self.pair.decode.endpoint.release(self.held.pop(index))
        self.pair.decode.endpoint.send_ready(PREFILL, Ready("fence", 1, 0))
        self.pair.prefill.next_of(ReadyReceived)
        self.num_outstanding -= 1
        for kept in self.held:
            assert (kept.data == kept.header.page_start % 256).all()

    def finish(self) -> None:
        self.receive_all()
        while self.held:
            self.release(0)
        self.pair.decode.assert_silent()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=steps)
def test_any_schedule_arrives_in_order_and_within_credits(
    pair: Pair, schedule: list[tuple[str, int]]
) -> None:
    run = Run(pair)
    for action, argument in schedule:
        run.step(action, argument)
    run.finish()

"""`StreamStock`: who gets which CUDA stream, with streams that only count."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch

from phloem.shared.transfer.streams import StreamStock

DEVICE = torch.device("cuda:0")
_numbers = itertools.count()


@dataclass
class CountedStream:
    device: torch.device | None = None
    priority: int = 0
    stream_id: int = field(default_factory=_numbers.__next__)
    device_index: int = 0
    device_type: int = 1
    is_idle: bool = True

    def query(self) -> bool:
        return self.is_idle


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", CountedStream)


def test_streams_that_somebody_refers_to_are_distinct() -> None:
    stock = StreamStock()
    taken = [stock.take(DEVICE) for _ in range(30)]
    assert len({stream.stream_id for stream in taken}) == 30


def test_dropped_stream_is_taken_again() -> None:
    stock = StreamStock()
    first, second = stock.take(DEVICE), stock.take(DEVICE)
    number = first.stream_id
    del first
    assert stock.take(DEVICE).stream_id == number != second.stream_id


def test_dropped_stream_rests_while_something_waits_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = StreamStock()
    number = stock.take(DEVICE).stream_id
    with monkeypatch.context() as busy:
        busy.setattr(CountedStream, "query", lambda _: False)
        other = stock.take(DEVICE)
        assert other.stream_id != number
    assert stock.take(DEVICE).stream_id == number

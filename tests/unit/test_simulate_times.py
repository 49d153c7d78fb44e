"""The model of the device, and the discrete clock."""

from __future__ import annotations

import pytest

from phloem.simulate.events import EventQueue
from phloem.simulate.options import StepModel
from phloem.simulate.step_time import decode_s, prefill_s

MODEL = StepModel()


@pytest.mark.parametrize(("num_tokens", "measured_ms"), [(512, 14.0), (1024, 25.16), (8192, 221.51)])
def test_prefill_is_what_was_measured(num_tokens: int, measured_ms: float) -> None:
    assert prefill_s(MODEL, 0, num_tokens) * 1e3 == pytest.approx(measured_ms, rel=0.005)


@pytest.mark.parametrize(
    ("batch", "context", "measured_ms"),
    [(1, 1024, 4.84), (16, 1024, 5.45), (64, 1024, 7.36), (256, 2048, 23.78)],
)
def test_decode_is_what_was_measured(batch: int, context: int, measured_ms: float) -> None:
    assert decode_s(MODEL, batch, batch * context) * 1e3 == pytest.approx(measured_ms, rel=0.01)


def test_chunks_of_a_prompt_cost_what_the_whole_does_and_their_fixed_parts() -> None:
    whole = prefill_s(MODEL, 0, 3000)
    parts = prefill_s(MODEL, 0, 1000) + prefill_s(MODEL, 1000, 2000)
    assert parts == pytest.approx(whole + MODEL.prefill_fixed_s)


def test_events_come_in_order_of_time_then_of_asking() -> None:
    events, seen = EventQueue(), list[str]()
    events.at(2.0, lambda: seen.append("late"))
    events.at(1.0, lambda: seen.append("first"))
    events.at(1.0, lambda: events.after(0.5, lambda: seen.append("nested")))
    events.run(lambda: False)
    assert seen == ["first", "nested", "late"]
    assert events.now_s == 2.0


def test_an_event_of_the_past_is_due_now() -> None:
    events, at = EventQueue(), list[float]()
    events.at(5.0, lambda: events.at(1.0, lambda: at.append(events.now_s)))
    events.run(lambda: False)
    assert at == [5.0]

"""`PostedEvent`: who waits for a peer for long lets others have the interpreter while they call CUDA."""

from __future__ import annotations

from typing import Any

import pytest

from phloem.shared.errors import PhloemError
from phloem.shared.transfer import device_event
from phloem.shared.transfer.device_event import PostedEvent
from tests.support.giving_way import GivingWay


class Event:
    """Done at the first look while calls do as they do in `when`, or never."""

    def __init__(self, driver: GivingWay, when: bool | None) -> None:
        self._driver = driver
        self._when = when

    def query(self) -> bool:
        return self._when is not None and self._driver.gives_way == self._when


def posted(when: bool | None) -> tuple[GivingWay, PostedEvent]:
    driver: Any = GivingWay()
    return driver, PostedEvent(Event(driver, when), driver)


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_event, "USUAL_WAIT_S", 0.01)


@pytest.mark.parametrize("late", [False, True])
def test_only_a_long_wait_has_others_give_way(late: bool) -> None:
    driver, event = posted(late)
    event.wait(10.0)
    assert driver.long_calls == [None] * late and not driver.gives_way


@pytest.mark.parametrize("timeout_s", [0.0, 0.005, 0.05])
def test_wait_ends_at_its_deadline(timeout_s: float) -> None:
    driver, event = posted(None)
    with pytest.raises(PhloemError) as caught:
        event.wait(timeout_s)
    assert not driver.gives_way
    assert caught.value.code == "transfer_timeout"
    assert f"{timeout_s:.1f} s" in str(caught.value)

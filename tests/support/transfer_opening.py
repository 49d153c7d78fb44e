"""Channels whose opening hangs, as NCCL's first calls do when the peer stops just then."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor

from phloem.shared.transfer import opening
from phloem.shared.transfer.errors import channel_lost
from phloem.shared.transfer.pending import Moved, Pending
from phloem.shared.transfer.planes import DataPlane, PlaneSpec, open_plane
from phloem.shared.transfer.rendezvous import ControlStore
from tests.support.transfer import DECODE, PREFILL, Recorded, one_end, transfer_config, wait_until


class HangingPlane:
    """Its first send does not return before it is aborted."""

    runs_ahead = False

    def __init__(self) -> None:
        self.is_aborted = threading.Event()

    def post_send(self, data: Tensor, after: Moved | None = None, num_bytes: int | None = None) -> Pending:
        assert self.is_aborted.wait(60.0)
        raise channel_lost("aborted")

    def post_receive(self, slot: Tensor, num_bytes: int, after: Moved | None = None) -> Pending:
        return self.post_send(slot)

    def abort(self) -> None:
        self.is_aborted.set()


class Hanging:
    """In the place of `open_plane`: hangs in its first `times` calls, until the test lets them go on."""

    def __init__(self, times: int) -> None:
        self._left = times
        self.planes: list[HangingPlane] = []
        self.num_calls = 0
        self.may_go_on = threading.Event()

    def __call__(self, spec: PlaneSpec, store: ControlStore) -> DataPlane:
        self.num_calls += 1
        if self.num_calls > self._left:
            return open_plane(spec, store)
        assert self.may_go_on.wait(60.0)
        self.planes.append(HangingPlane())
        return self.planes[-1]


class Hangs:
    """Makes openings hang, until `end`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._made: list[Hanging] = []

    def __call__(self, times: int) -> Hanging:
        """The next `times` of them."""
        self._made.append(Hanging(times))
        self._monkeypatch.setattr(opening, "open_plane", self._made[-1])
        return self._made[-1]

    def end(self) -> None:
        for hanging in self._made:
            hanging.may_go_on.set()
        wait_until(lambda: not open_threads())


def open_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("phloem-transfer-open")]


@contextmanager
def both_ends(timeout_s: float, opening_timeout_s: float) -> Iterator[tuple[Recorded, Recorded]]:
    """Prefill's and decode's."""
    ends = (
        transfer_config(PREFILL, timeout_s=timeout_s, opening_timeout_s=opening_timeout_s),
        transfer_config(DECODE, accepts=True, timeout_s=timeout_s, opening_timeout_s=opening_timeout_s),
    )
    with one_end(ends[1]) as decode, one_end(ends[0]) as prefill:
        yield prefill, decode

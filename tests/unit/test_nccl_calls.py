"""What NCCL is called with, without NCCL."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from phloem.shared.errors import PhloemError
from phloem.shared.transfer.nccl_calls import NcclCalls
from tests.support.giving_way import GivingWay

COMMUNICATOR, PEER, STREAM = 0x1230, 1, 0x4560
OPENING_S = 7.0


@dataclass
class Library:
    """Records calls, and whether they keep the interpreter; `result` is what they return."""

    result: int = 0
    calls: list[tuple[str, list[Any]]] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)

    def loaded(self, *, keeps: bool) -> Any:
        def called(name: str) -> Callable[..., int]:
            return lambda *arguments: self._called(name, keeps, arguments)

        return SimpleNamespace(
            ncclSend=called("send"), ncclRecv=called("receive"), ncclGetErrorString=_Tell()
        )

    def _called(self, name: str, keeps: bool, arguments: tuple[Any, ...]) -> int:
        self.calls.append((name, [argument.value for argument in arguments]))
        self.kept.append(keeps)
        return self.result


class _Tell:
    restype: type | None = None

    def __call__(self, result: ctypes.c_int) -> bytes:
        assert result.value == 1 and self.restype is ctypes.c_char_p
        return b"unhandled cuda error"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: made.loaded(keeps=False))
    monkeypatch.setattr(ctypes, "PyDLL", lambda name: made.loaded(keeps=True))
    return made


@pytest.fixture
def driver() -> Any:
    return GivingWay()


def stream() -> Any:
    return SimpleNamespace(cuda_stream=STREAM)


@pytest.mark.parametrize("name", ["send", "receive"])
def test_address_count_type_peer_communicator_and_stream_are_given(
    library: Library, name: str, driver: Any
) -> None:
    data = torch.zeros(4096, dtype=torch.uint8)[64:2064]
    getattr(NcclCalls(COMMUNICATOR, PEER, driver, OPENING_S), name)(data, 1000, stream())
    assert library.calls == [(name, [data.data_ptr(), 1000, 1, PEER, COMMUNICATOR, STREAM])]


@pytest.mark.parametrize("name", ["send", "receive"])
def test_only_the_call_that_connects_lets_go_of_the_interpreter(
    library: Library, name: str, driver: Any
) -> None:
    calls, data = NcclCalls(COMMUNICATOR, PEER, driver, OPENING_S), torch.zeros(8, dtype=torch.uint8)
    library.result = 1
    with pytest.raises(PhloemError):
        getattr(calls, name)(data, 8, stream())
    library.result = 0
    for _ in range(3):
        getattr(calls, name)(data, 8, stream())
    assert library.kept == [False, False, True, True]
    assert driver.long_calls == [OPENING_S] * 2  # others let go of it, too, while it connects


@pytest.mark.parametrize("name", ["send", "receive"])
def test_while_channels_come_or_go_all_calls_let_go_of_it(library: Library, name: str, driver: Any) -> None:
    calls, data = NcclCalls(COMMUNICATOR, PEER, driver, OPENING_S), torch.zeros(8, dtype=torch.uint8)
    for gives_way in (False, False, True, False):
        driver.gives_way = gives_way
        getattr(calls, name)(data, 8, stream())
    assert library.kept == [False, True, False, True]


def test_failure_is_told_in_nccls_words(library: Library, driver: Any) -> None:
    library.result = 1
    with pytest.raises(PhloemError, match="unhandled cuda error") as caught:
        NcclCalls(COMMUNICATOR, PEER, driver, OPENING_S).send(torch.zeros(8, dtype=torch.uint8), 8, stream())
    assert caught.value.code == "channel_lost"


def test_group_without_a_communicator_makes_no_channel(library: Library, driver: Any) -> None:
    with pytest.raises(PhloemError) as caught:
        NcclCalls(0, PEER, driver, OPENING_S)
    assert caught.value.code == "channel_lost" and not library.calls

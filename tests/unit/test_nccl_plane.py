"""What the channel's end over NCCL does while it ends, without NCCL."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from phloem.shared.errors import PhloemError
from phloem.shared.transfer.errors import channel_lost
from phloem.shared.transfer.planes import DataPlane, PlaneSpec
from phloem.shared.transfer.traffic import DeviceTraffic
from tests.support.giving_way import GivingWay

WAIT_S = 5.0
LONG_S = 60.0  # of the plane: nothing here ends by its deadline


class Nccl:
    """A communicator whose abort, and whose sends, take until the test lets them end."""

    def __init__(self) -> None:
        self.is_aborting, self.may_abort = threading.Event(), threading.Event()
        self.is_sending, self.may_send = threading.Event(), threading.Event()
        self.order: list[str] = []

    def abort(self) -> None:
        self.order.append("abort")
        self.is_aborting.set()
        assert self.may_abort.wait(WAIT_S)

    def send(self, data: torch.Tensor, num_bytes: int, stream: Any) -> None:
        del data, num_bytes, stream
        self.is_sending.set()
        assert self.may_send.wait(WAIT_S)
        self.order.append("sent")

    def _comm_ptr(self) -> int:
        return 1


class _Event:
    def __init__(self, driver: object) -> None:
        del driver
        self.is_done = False

    def query(self) -> bool:
        return self.is_done

    def record(self, stream: object) -> None:
        del stream


@pytest.fixture
def nccl() -> Iterator[Nccl]:
    made = Nccl()
    yield made
    made.may_abort.set()
    made.may_send.set()


@pytest.fixture
def driver() -> GivingWay:
    return GivingWay()


@pytest.fixture
def traffic() -> DeviceTraffic:
    return DeviceTraffic()


@pytest.fixture
def plane(
    nccl: Nccl, driver: GivingWay, traffic: DeviceTraffic, monkeypatch: pytest.MonkeyPatch
) -> DataPlane:
    if not hasattr(torch.distributed, "ProcessGroupNCCL"):  # in torch's builds for CPUs
        monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", None, raising=False)
    module = importlib.import_module("phloem.shared.transfer.nccl_plane")
    calls = SimpleNamespace(send=nccl.send, receive=nccl.send)

    def join_group(spec: object, store: object, max_ctas: int) -> Nccl:
        del spec, store, max_ctas
        assert driver.num_long == 1
        return nccl

    monkeypatch.setattr(module, "join_group", join_group)
    monkeypatch.setattr(module, "cuda_driver", lambda device: driver)
    monkeypatch.setattr(module, "NcclCalls", lambda *arguments: calls)
    monkeypatch.setattr(module, "CudaEvent", _Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    streams: Any = SimpleNamespace(take=lambda device: None)
    spec = PlaneSpec("127.0.0.1", "prefill", "cuda:0", LONG_S, streams=streams, traffic=traffic)
    made: DataPlane = module.NcclPlane(spec, None)
    return made


def in_thread(call: Any) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_who_posts_while_nccl_gives_a_channel_up_is_refused_at_once(nccl: Nccl, plane: DataPlane) -> None:
    """The engine's thread, that is, and all of its requests."""
    nccl.may_send.set()
    aborting = in_thread(plane.abort)
    assert nccl.is_aborting.wait(WAIT_S)
    codes: list[str] = []

    def post() -> None:
        with pytest.raises(PhloemError) as caught:
            plane.post_send(torch.zeros(1, dtype=torch.uint8))
        codes.append(caught.value.code)

    posting = in_thread(post)
    posting.join(WAIT_S / 2)
    assert codes == ["channel_lost"]
    nccl.may_abort.set()
    for thread in (posting, aborting):
        thread.join(WAIT_S)
    assert nccl.order == ["abort"]


def test_abort_waits_for_who_is_posting(nccl: Nccl, plane: DataPlane) -> None:
    nccl.may_abort.set()
    posting = in_thread(lambda: plane.post_send(torch.zeros(1, dtype=torch.uint8)))
    assert nccl.is_sending.wait(WAIT_S)
    aborting = in_thread(plane.abort)
    assert not nccl.is_aborting.wait(0.1)
    nccl.may_send.set()
    for thread in (posting, aborting):
        thread.join(WAIT_S)
    assert nccl.order == ["sent", "abort"]


def test_calls_give_way_while_nccl_makes_a_channel_or_gives_it_up(
    nccl: Nccl, driver: GivingWay, plane: DataPlane
) -> None:
    """The fixture has looked while it was made."""
    assert driver.num_long == 0
    aborting = in_thread(plane.abort)
    assert nccl.is_aborting.wait(WAIT_S)
    assert driver.num_long == 1
    nccl.may_abort.set()
    aborting.join(WAIT_S)
    assert driver.num_long == 0


def test_channel_is_given_up_when_what_others_have_under_way_has_ended(
    nccl: Nccl, traffic: DeviceTraffic, plane: DataPlane
) -> None:
    """A peer of another channel may hang: until NCCL has freed memory nobody could use the device."""
    traffic.enter().newest = theirs = _Event(None)
    nccl.may_abort.set()
    nccl.may_send.set()
    plane.post_send(torch.zeros(1, dtype=torch.uint8))  # ends by the abort alone
    aborting = in_thread(plane.abort)
    assert not nccl.is_aborting.wait(0.1)
    theirs.is_done = True
    aborting.join(WAIT_S)
    assert nccl.order == ["sent", "abort"]


def test_what_a_channel_posts_is_known_until_it_is_given_up(
    nccl: Nccl, traffic: DeviceTraffic, plane: DataPlane
) -> None:
    nccl.may_send.set()
    nccl.may_abort.set()
    plane.post_send(torch.zeros(1, dtype=torch.uint8))
    others = in_thread(lambda: traffic.settle(LONG_S))
    others.join(0.1)
    assert others.is_alive()
    plane.abort()
    others.join(WAIT_S)
    assert not others.is_alive()


def test_group_that_makes_no_channel_is_given_up(
    nccl: Nccl, plane: DataPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not left to its destructor, which would free memory with nobody giving way."""
    nccl.may_abort.set()

    def refuse(*arguments: object) -> None:
        raise channel_lost("torch's NCCL can't be called")

    module = importlib.import_module(type(plane).__module__)
    monkeypatch.setattr(module, "NcclCalls", refuse)
    with pytest.raises(PhloemError, match="can't be called"):
        module.NcclPlane(PlaneSpec("127.0.0.1", "prefill", "cuda:0", LONG_S), None)
    assert nccl.order == ["abort"]

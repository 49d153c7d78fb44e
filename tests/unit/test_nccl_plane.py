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
from phloem.shared.transfer.planes import DataPlane, PlaneSpec

WAIT_S = 5.0


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

    def record(self, stream: object) -> None:
        del stream


@pytest.fixture
def nccl() -> Iterator[Nccl]:
    made = Nccl()
    yield made
    made.may_abort.set()
    made.may_send.set()


@pytest.fixture
def plane(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> DataPlane:
    if not hasattr(torch.distributed, "ProcessGroupNCCL"):  # in torch's builds for CPUs
        monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", None, raising=False)
    module = importlib.import_module("phloem.shared.transfer.nccl_plane")
    calls = SimpleNamespace(send=nccl.send, receive=nccl.send)
    monkeypatch.setattr(module, "join_group", lambda spec, store, max_ctas: nccl)
    monkeypatch.setattr(module, "cuda_driver", lambda device: None)
    monkeypatch.setattr(module, "NcclCalls", lambda communicator, peer: calls)
    monkeypatch.setattr(module, "CudaEvent", _Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    streams: Any = SimpleNamespace(take=lambda device: None)
    spec = PlaneSpec("127.0.0.1", "prefill", "cuda:0", WAIT_S, streams=streams)
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

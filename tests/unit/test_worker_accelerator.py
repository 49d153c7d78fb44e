"""Which GPU a worker gets: device nodes that the test makes, claims in a real Valkey."""

from __future__ import annotations

from pathlib import Path

import pytest

from phloem.shared.discovery.registry import Registry
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import PeerRef
from phloem.shared.worker import accelerator
from phloem.shared.worker.accelerator import HostGpus, claimed_gpu, host_gpus

TWO = HostGpus("host", (0, 3), ("0", "1"))


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /dev with two GPUs, and a torch that can use them."""
    for name in ("nvidia3", "nvidia0", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    monkeypatch.setattr(accelerator, "version", lambda package: "2.13.0")
    return tmp_path


def test_gpus_are_the_numbered_nodes(dev: Path) -> None:
    found = host_gpus({}, dev)
    assert (found.minors, found.visible) == ((0, 3), ("0", "1"))
    assert found.host_id


@pytest.mark.parametrize(
    ("chosen", "minors", "visible"),
    [
        ("1", (3,), ("1",)),
        ("1, 0", (3, 0), ("1", "0")),
        ("", (), ()),
        ("GPU-8f", (), ()),
        ("7", (), ()),
    ],
)
def test_hidden_gpus_are_not_claimed(
    dev: Path, chosen: str, minors: tuple[int, ...], visible: tuple[str, ...]
) -> None:
    found = host_gpus({"CUDA_VISIBLE_DEVICES": chosen}, dev)
    assert (found.minors, found.visible) == (minors, visible)


def test_torch_without_cuda_has_no_gpu(dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "version", lambda package: "2.13.0+cpu")
    assert host_gpus({}, dev).minors == ()


async def test_every_worker_gets_a_gpu_of_its_own(registry: Registry) -> None:
    async with (
        claimed_gpu(registry, TWO, "cuda", PeerRef("a", 1)) as first,
        claimed_gpu(registry, TWO, "auto", PeerRef("b", 2)) as second,
    ):
        assert {first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]} == {"0", "1"}


async def test_without_a_free_gpu_cuda_fails_and_auto_runs_on_the_cpu(registry: Registry) -> None:
    one = HostGpus("host", (0,), ("0",))
    async with claimed_gpu(registry, one, "cuda", PeerRef("a", 1)):
        with pytest.raises(PhloemError) as caught:
            async with claimed_gpu(registry, one, "cuda", PeerRef("b", 2), wait_s=0.0):
                pass
        assert (caught.value.code, caught.value.retryable) == ("no_free_device", True)
        assert "run a `unified` worker" in str(caught.value)
        async with claimed_gpu(registry, one, "auto", PeerRef("b", 2)) as env:
            assert env == {"CUDA_VISIBLE_DEVICES": ""}
    async with claimed_gpu(registry, one, "cuda", PeerRef("b", 2)) as env:
        assert env["CUDA_VISIBLE_DEVICES"] == "0"


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
async def test_named_device_is_taken_as_said(registry: Registry, device: str) -> None:
    async with claimed_gpu(registry, TWO, device, PeerRef("a", 1)) as env:
        assert env == {}

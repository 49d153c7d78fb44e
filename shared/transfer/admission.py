"""Whom the decode side lets in: pure decisions over what it has seen."""

from __future__ import annotations

from collections import Counter

from phloem.shared.protocol.transfer import Open, Refused
from phloem.shared.transfer.config import TransferConfig

MAX_CHANNELS = 256
MAX_REMEMBERED_WORKERS = 4096
MAX_NAME_CHARS = 1024
MAX_STRANGERS = 64
MAX_STRANGERS_PER_HOST = 16  # whoever opens many from one address does not keep the others out
_NO_NCCL = "Gloo, on a CPU"


class Strangers:
    """Connections that have not proven themselves yet, by the address that they come from."""

    def __init__(self) -> None:
        self._by_host: Counter[str] = Counter()

    def enter(self, host: str) -> bool:
        """False: there are too many, one more is closed at once. Who entered leaves."""
        if self._by_host.total() >= MAX_STRANGERS or self._by_host[host] >= MAX_STRANGERS_PER_HOST:
            return False
        self._by_host[host] += 1
        return True

    def leave(self, host: str) -> None:
        self._by_host[host] -= 1
        if not self._by_host[host]:
            del self._by_host[host]


class SeenEpochs:
    """The newest epoch of each prefill worker, of the last `MAX_REMEMBERED_WORKERS` that came."""

    def __init__(self) -> None:
        self._newest: dict[str, int] = {}

    def newest(self, worker_id: str) -> int:
        """0 when the worker never came."""
        return self._newest.get(worker_id, 0)

    def note(self, worker_id: str, epoch: int) -> None:
        newest = max(epoch, self._newest.pop(worker_id, 0))
        self._newest[worker_id] = newest
        if len(self._newest) > MAX_REMEMBERED_WORKERS:
            del self._newest[next(iter(self._newest))]


def layout_mismatch(theirs: str, ours: str) -> str:
    """Why KV does not move between two layouts, and what to do about it."""
    return f"KV layout {theirs!r} is not {ours!r}: run both workers with the same model, dtype and page size"


def refusal(request: Open, config: TransferConfig, newest_epoch: int, num_channels: int) -> Refused | None:
    """None when the channel may open. Of these reasons only `overloaded` is worth another try; so is
    `staging_full`, with which the pool answers who is let in here.

    `newest_epoch` is the newest seen of the prefill worker, `num_channels` counts other workers' channels.
    """
    names = (request.channel_name, request.prefill.worker_id)
    if request.staging_bytes <= 0 or any(len(name) > MAX_NAME_CHARS for name in names):
        return Refused("transfer_protocol", "the Open message makes no sense")
    if request.decode != config.me:
        return Refused(
            "stale_epoch", f"{request.decode} was dialed, this is {config.me}: wait for its new registration"
        )
    if request.prefill.epoch < newest_epoch:
        return Refused("stale_epoch", f"{request.prefill} is superseded by epoch {newest_epoch}")
    if request.kv_layout != config.kv_layout:
        return Refused("kv_layout_mismatch", layout_mismatch(request.kv_layout, config.kv_layout))
    if request.device_id and request.device_id == config.device_id:
        return Refused(
            "same_device",
            f"{request.prefill.worker_id} and {config.me.worker_id} are on the same GPU, and NCCL joins no "
            "two processes on one: give each its own, or run a `unified` worker instead of both",
        )
    if request.link != config.link:
        both = request.link and config.link
        remedy = "give both workers the same" if both else "run both on GPUs, or both with --device cpu"
        return Refused(
            "link_mismatch",
            f"{request.prefill.worker_id} sends over {request.link or _NO_NCCL}, {config.me.worker_id} "
            f"receives over {config.link or _NO_NCCL}: {remedy}",
        )
    if num_channels >= MAX_CHANNELS:
        return Refused("overloaded", f"{num_channels} transfer channels are open")
    return None

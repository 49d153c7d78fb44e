"""How the bytes of a channel move: the only place where Gloo and NCCL differ.

A plane joins exactly two ranks (decode 0, prefill 1). Prefill posts sends, decode posts receives, in the
same order; a posted operation is waited for by another thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from phloem.shared.transfer.events import Side
from phloem.shared.transfer.rendezvous import ControlStore

RANKS: dict[Side, int] = {"decode": 0, "prefill": 1}


class Pending(Protocol):
    """Something that the device will have done."""

    def wait(self, timeout_s: float) -> None:
        """Returns when it is done. Raises `transfer_timeout` or `channel_lost`; the plane is broken then."""


class DataPlane(Protocol):
    """`post_*` never block for the peer; `abort` may be called from any thread, and wakes every wait."""

    def post_send(self, data: Tensor) -> Pending: ...

    def post_receive(self, slot: Tensor, num_bytes: int) -> Pending:
        """Receives the first `num_bytes` of `slot`."""

    def work_so_far(self) -> Pending:
        """What the calling thread has launched on the device until now (gathers, scatters)."""

    def abort(self) -> None: ...


@dataclass(frozen=True, slots=True)
class PlaneSpec:
    """One rank's part of a plane; `host` is the own address that its sockets bind to."""

    host: str
    side: Side
    device: str
    timeout_s: float


def open_plane(spec: PlaneSpec, store: ControlStore) -> DataPlane:
    """Joins the group, waiting for the other rank at most `timeout_s`. Raises `channel_lost`,
    `transfer_timeout`, or `transfer_protocol`."""
    if spec.device == "cpu":
        from phloem.shared.transfer.gloo_plane import GlooPlane

        return GlooPlane(spec, store)
    from phloem.shared.transfer.nccl_plane import NcclPlane

    return NcclPlane(spec, store)

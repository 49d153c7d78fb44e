"""How the bytes of a channel move: the only place where Gloo and NCCL differ.

A plane joins exactly two ranks (decode 0, prefill 1). Prefill posts sends, decode posts receives, in the
same order; a posted operation is waited for by another thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from phloem.shared.transfer.config import MAX_CTAS, OPENING_TIMEOUT_S
from phloem.shared.transfer.events import Side
from phloem.shared.transfer.pending import Moved, Pending
from phloem.shared.transfer.rendezvous import ControlStore
from phloem.shared.transfer.streams import StreamStock
from phloem.shared.transfer.traffic import DeviceTraffic

RANKS: dict[Side, int] = {"decode": 0, "prefill": 1}


class DataPlane(Protocol):
    """`post_*` never block for the peer; `abort` may be called from any thread, and wakes every wait. After a
    wait that raised, the plane is broken."""

    @property
    def runs_ahead(self) -> bool:
        """What `post_receive` answers is `Incoming`: the device waits for bytes, the engine does not."""

    def post_send(self, data: Tensor, after: Moved | None = None, num_bytes: int | None = None) -> Pending:
        """Sends the first `num_bytes` of `data` (None: all) once `after` is done, and what was posted."""

    def post_receive(self, slot: Tensor, num_bytes: int, after: Moved | None = None) -> Pending:
        """Receives the first `num_bytes` of `slot` once `after` is done."""

    def abort(self) -> None:
        """Returns when nothing writes to the memory of a receive any more. May take long, on a GPU the spec's
        `longest_s` and what NCCL takes; when it raises, or never returns, something still may."""


@dataclass(frozen=True, slots=True)
class PlaneSpec:
    """One rank's part of a plane; `host` is the own address that its sockets bind to, `max_ctas` bounds the
    streaming multiprocessors that NCCL may use at a time. Joining the plane, and its first byte, may take
    `opening_timeout_s` each, what comes then `timeout_s`. Planes of one device share `streams` and
    `traffic`."""

    host: str
    side: Side
    device: str
    timeout_s: float
    max_ctas: int = MAX_CTAS
    opening_timeout_s: float = OPENING_TIMEOUT_S
    streams: StreamStock = field(default_factory=StreamStock, compare=False, repr=False)
    traffic: DeviceTraffic = field(default_factory=DeviceTraffic, compare=False, repr=False)

    @property
    def longest_s(self) -> float:
        """After which no operation of a plane is under way, or its channel is given up."""
        return max(self.timeout_s, self.opening_timeout_s)


def open_plane(spec: PlaneSpec, store: ControlStore) -> DataPlane:
    """Joins the group, waiting for the other rank at most `opening_timeout_s`. Raises
    `channel_lost`, `transfer_timeout`, or `transfer_protocol`."""
    if spec.device == "cpu":
        from phloem.shared.transfer.gloo_plane import GlooPlane

        return GlooPlane(spec, store)
    from phloem.shared.transfer.nccl_plane import NcclPlane

    return NcclPlane(spec, store)

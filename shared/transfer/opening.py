"""The opening of a channel's plane: both ranks join it, then the first byte goes from prefill to decode.

NCCL's first calls wait for the peer and know no deadline: if that stops just then, they never return. So they
are made on a thread of their own, and whoever opens the channel waits for them in bounds, which are wide: on
a busy host NCCL needs seconds. Who waits beats on the control connection: so a peer that dies is noticed at
once, and one that has opened its side already does not take this one for silent. What is given up cleans up
behind itself when NCCL lets it, which may be when the peer's process ends, or never. It refers to nothing of
the channel: others have its staging memory by then.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from phloem.shared.errors import ErrorInfo, PhloemError, overloaded
from phloem.shared.protocol.session import PeerRef
from phloem.shared.transfer.device_event import settle, use_device
from phloem.shared.transfer.errand import Errand
from phloem.shared.transfer.errors import channel_lost, protocol_violation, transfer_timeout
from phloem.shared.transfer.planes import DataPlane, PlaneSpec, open_plane
from phloem.shared.transfer.rendezvous import ControlStore

log = logging.getLogger(__name__)

_CLEAN_UP_S = 0.5  # what is given up ends by then as a rule, or hangs
_BEAT_S = 0.05
_LOOK_S = 0.05
MAX_STUCK_PER_PEER = 4


class Opening:
    """Of one plane; begins at once."""

    def __init__(self, spec: PlaneSpec, store: ControlStore, name: str) -> None:
        self._spec = spec
        self._store = store
        self._name = name
        self._changed = threading.Condition()  # guards all below
        self._plane: DataPlane | None = None  # joined; whoever takes it from here uses it, or aborts it
        self._is_connected = False
        self._error: ErrorInfo | None = None
        self._errands = [Errand(self._open, f"phloem-transfer-open-{name}")]

    def plane(self) -> DataPlane:
        """Joined and connected. Each may take the spec's `opening_timeout_s`.

        Raises `transfer_timeout`, what the opening failed with, or was given up with; then `clean_up`.
        """
        self._wait(lambda: self._plane is not None, "the peer did not join the channel")
        self._wait(lambda: self._is_connected, "no byte went through the new channel")
        plane = self._take_plane()
        assert plane is not None, "it is taken once"
        return plane

    def give_up(self, error: ErrorInfo) -> None:
        """Any thread; returns at once. `plane` raises `error`, unless it has returned."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def clean_up(self) -> bool:
        """After `plane` has raised: aborts what there is of the plane. Whether all has ended."""
        plane = self._take_plane()
        if plane is not None:
            self._errands.append(Errand(plane.abort, f"phloem-transfer-abort-{self._name}"))
        return all([errand.wait(_CLEAN_UP_S) for errand in self._errands])

    @property
    def is_over(self) -> bool:
        """No thread of it is left."""
        return all(errand.is_over for errand in self._errands)

    def _wait(self, is_there: Callable[[], bool], otherwise: str) -> None:
        bound_s = self._spec.opening_timeout_s
        deadline = time.monotonic() + bound_s
        while not self._is_soon(is_there):
            try:
                self._store.beat()
            except PhloemError as error:
                self.give_up(error.info)
            if time.monotonic() >= deadline:
                self.give_up(transfer_timeout(f"{otherwise} within {bound_s:g} s").info)

    def _is_soon(self, is_there: Callable[[], bool]) -> bool:
        """Within a beat. Raises what the opening has failed with."""
        with self._changed:
            self._changed.wait_for(lambda: is_there() or self._error is not None, _BEAT_S)
            if self._error is not None:
                raise PhloemError.from_info(self._error)
            return is_there()

    def _open(self) -> None:
        try:
            use_device(self._spec.device)
            plane = open_plane(self._spec, self._store)
            self._joined(plane)
            move_first_byte(plane, self._spec)
            with self._changed:
                self._is_connected = True
                self._changed.notify_all()
        except PhloemError as error:
            self.give_up(error.info)
        except Exception:  # a bug of ours, or torch's: whoever waits must know
            log.exception("opening channel %s", self._name)
            self.give_up(channel_lost("opening failed; see the worker's log").info)

    def _joined(self, plane: DataPlane) -> None:
        with self._changed:
            if self._error is None:
                self._plane = plane
                self._changed.notify_all()
                return
        plane.abort()
        raise channel_lost("nobody wants it any more")

    def _take_plane(self) -> DataPlane | None:
        with self._changed:
            plane, self._plane = self._plane, None
            return plane


def move_first_byte(plane: DataPlane, spec: PlaneSpec) -> None:
    """From prefill to decode. Raises `transfer_timeout`, `channel_lost` or `transfer_protocol`."""
    sends = spec.side == "prefill"
    byte = torch.full((1,), int(sends), dtype=torch.uint8, device=spec.device)
    # It is written behind the steps, for which the plane does not wait: maybe when the byte has come.
    settle(spec.device, spec.opening_timeout_s)
    if sends:
        plane.post_send(byte).wait(spec.opening_timeout_s)
        return
    plane.post_receive(byte, 1).wait(spec.opening_timeout_s)
    if int(byte) != 1:
        raise protocol_violation("the first byte is wrong")


@dataclass(frozen=True, slots=True)
class _Stuck:
    peer: PeerRef
    opening: Opening
    since_s: float


class StuckOpenings:
    """Those of an endpoint that were given up and have not ended: each keeps a thread, and what NCCL has
    allocated. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stuck: list[_Stuck] = []

    def add(self, peer: PeerRef, opening: Opening) -> None:
        with self._lock:
            self._stuck.append(_Stuck(peer, opening, time.monotonic()))

    def wait_for_end(self, peer: PeerRef, patience_s: float, cancelled: threading.Event) -> None:
        """Until those with the peer have ended that came within the last `patience_s`: NCCL needs longer for
        what is opened beside them, and an opening that is given up for that leaves one more. One that does
        not end in that time holds up nobody."""
        while self._are_ending(peer, patience_s) and not cancelled.wait(_LOOK_S):
            pass

    def count(self, peer: PeerRef) -> int:
        """Of one epoch of a worker: a new process has no part in the old one's."""
        with self._lock:
            self._stuck = [stuck for stuck in self._stuck if not stuck.opening.is_over]
            return sum(stuck.peer == peer for stuck in self._stuck)

    @property
    def are_there(self) -> bool:
        """Whether any is."""
        with self._lock:
            return any(not stuck.opening.is_over for stuck in self._stuck)

    def check(self, peer: PeerRef) -> None:
        """Raises `overloaded` when one more would be one too many."""
        count = self.count(peer)
        if count >= MAX_STUCK_PER_PEER:
            raise overloaded(
                f"{count} channels with {peer} hang in the middle of opening: does NCCL reach from host to "
                "host (NCCL_DEBUG=INFO tells more)? Restart one of the two workers to try again"
            )

    def _are_ending(self, peer: PeerRef, patience_s: float) -> bool:
        since_s = time.monotonic() - patience_s
        with self._lock:
            return any(
                stuck.peer == peer and stuck.since_s > since_s and not stuck.opening.is_over
                for stuck in self._stuck
            )

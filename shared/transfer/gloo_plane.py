"""A channel's bytes over Gloo (CPU)."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo

from phloem.shared.transfer.errors import channel_lost, transfer_timeout
from phloem.shared.transfer.pending import Moved, Pending
from phloem.shared.transfer.planes import RANKS, PlaneSpec
from phloem.shared.transfer.rendezvous import ControlStore

_DATA_TAG = 0
_ABORT_TAG = 1
_TIMED_OUT = "Timed out"


class GlooPlane:
    """See `DataPlane`."""

    runs_ahead = False

    def __init__(self, spec: PlaneSpec, store: ControlStore) -> None:
        self._rank = RANKS[spec.side]
        self._timeout_s = spec.timeout_s
        try:
            # Any: the stubs lack send and recv.
            self._group: Any = ProcessGroupGloo(store, self._rank, 2, _options(spec))
        except RuntimeError as error:
            raise channel_lost(f"the peer did not join the group: {error}") from error
        self._nothing = torch.empty(1, dtype=torch.uint8)

    def post_send(self, data: Tensor, after: Moved | None = None, num_bytes: int | None = None) -> Pending:
        if after is not None:
            after.wait(self._timeout_s)
        try:
            return _PendingWork(self._group.send([data[:num_bytes]], 1 - self._rank, _DATA_TAG))
        except RuntimeError as error:
            raise channel_lost(f"sending failed: {error}") from error

    def post_receive(self, slot: Tensor, num_bytes: int, after: Moved | None = None) -> Pending:
        if after is not None:
            after.wait(self._timeout_s)
        # Gloo ends the process when a message is longer than the buffer, and takes a shorter one: offer the
        # whole slot, so that a peer whose bytes don't match its header can't kill us. The digest tells.
        del num_bytes
        try:
            return _PendingWork(self._group.recv([slot], 1 - self._rank, _DATA_TAG))
        except RuntimeError as error:
            raise channel_lost(f"receiving failed: {error}") from error

    def abort(self) -> None:
        # ProcessGroupGloo.abort() leaves waiting threads asleep (torch 2.13). A receive that times out
        # closes the pair, which wakes them and tells the peer, within 10 ms.
        with contextlib.suppress(RuntimeError):
            self._group.recv([self._nothing], 1 - self._rank, _ABORT_TAG).wait(timedelta(milliseconds=1))


class _PendingWork:
    # Any: torch's stubs keep Work in a private module.
    def __init__(self, work: Any) -> None:
        self._work = work

    def done(self) -> bool:
        return bool(self._work.is_completed())

    def wait(self, timeout_s: float) -> None:
        try:
            self._work.wait(timedelta(seconds=max(timeout_s, 0.001)))
        except RuntimeError as error:
            # Gloo measures on a clock of its own, so that only its words tell which it was.
            if _TIMED_OUT in str(error):
                raise transfer_timeout(f"no data moved for {timeout_s:.1f} s") from error
            raise channel_lost(f"the data connection broke: {error}") from error


def _options(spec: PlaneSpec) -> Any:
    """Any: the stubs lack `_Options` and its fields."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=spec.host)]
    options._timeout = timedelta(seconds=spec.opening_timeout_s)
    options._threads = 1
    return options

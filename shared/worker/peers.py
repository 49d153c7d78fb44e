"""Which other workers this one exchanges KV with, and how that changes."""

from __future__ import annotations

import logging

from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.protocol.cluster import Role, WorkerRecord
from phloem.shared.protocol.engine import PeerDown, PeerUp
from phloem.shared.protocol.session import PeerRef
from phloem.shared.transfer.admission import layout_mismatch

log = logging.getLogger(__name__)

# A prefill worker hands over to whoever can decode, a unified one only to decode workers: two unified
# workers need no channel, each does both phases.
_TARGETS: dict[Role, tuple[Role, ...]] = {
    "prefill": ("decode", "unified"),
    "decode": (),
    "unified": ("decode",),
}


def roles_that_pair(role: Role) -> set[Role]:
    """Of the workers that one of `role` exchanges KV with, either way."""
    return {*_TARGETS[role], *(source for source, targets in _TARGETS.items() if role in targets)}


def hands_over_to(source: WorkerRecord, target: WorkerRecord) -> bool:
    """Whether `source` may send KV to `target`: roles that pair, the same layout, and an address."""
    return _would_hand_over_to(source, target) and target.kv_layout == source.kv_layout


def misfit(own: WorkerRecord, other: WorkerRecord) -> str:
    """Why KV moves neither way between two workers whose roles pair; "": it may, or their roles don't."""
    pair = _would_hand_over_to(own, other) or _would_hand_over_to(other, own)
    if not pair or own.kv_layout == other.kv_layout:
        return ""
    return f"{layout_mismatch(other.kv_layout, own.kv_layout)} ({_differences(other, own)})"


def _would_hand_over_to(source: WorkerRecord, target: WorkerRecord) -> bool:
    return (
        target.role in _TARGETS[source.role]
        and target.worker_id != source.worker_id
        and target.transfer_address != ""
    )


def _differences(other: WorkerRecord, own: WorkerRecord) -> str:
    """Of what a layout is made of, as far as records tell."""
    values = {
        "model": (other.model_id, own.model_id),
        "page size": (other.page_size, own.page_size),
        "bytes of KV a token": (other.kv_bytes_per_token, own.kv_bytes_per_token),
    }
    told = [
        f"{name}: {theirs} there, {ours} here" for name, (theirs, ours) in values.items() if theirs != ours
    ]
    return "; ".join(told) or "of one name and size: the weights, config.json or --load-format differ"


class Peers:
    """Turns snapshots into `PeerUp` and `PeerDown`.

    The side that dials hears of both; the other side hears only of losses, so that it can end hand-overs
    that wait for a peer that died before it dialled. Who can't be a peer is said once, in the log: nothing
    else would tell why such a worker gets no requests.
    """

    def __init__(self, own: WorkerRecord) -> None:
        self._own = own
        self._known: dict[PeerRef, str] = {}
        self._misfits: set[PeerRef] = set()

    def update(self, snapshot: ClusterSnapshot) -> list[PeerUp | PeerDown]:
        """What the engine must be told after `snapshot`: losses first."""
        dialled = self._addresses(snapshot)
        present = dialled | self._callers(snapshot)
        lost = [PeerDown(peer) for peer in self._known if peer not in present]
        found = [PeerUp(peer, address) for peer, address in dialled.items() if peer not in self._known]
        self._known = present
        self._warn(snapshot)
        return [*lost, *found]

    def _addresses(self, snapshot: ClusterSnapshot) -> dict[PeerRef, str]:
        return {_ref(w): w.transfer_address for w in snapshot.workers if hands_over_to(self._own, w)}

    def _callers(self, snapshot: ClusterSnapshot) -> dict[PeerRef, str]:
        return {_ref(w): "" for w in snapshot.workers if hands_over_to(w, self._own)}

    def _warn(self, snapshot: ClusterSnapshot) -> None:
        misfits = {_ref(w): why for w in snapshot.workers if (why := misfit(self._own, w))}
        for peer, why in misfits.items():
            if peer not in self._misfits:
                log.warning("no KV channel with %s, requests go elsewhere: %s", peer, why)
        self._misfits = set(misfits)


def _ref(record: WorkerRecord) -> PeerRef:
    return PeerRef(record.worker_id, record.epoch)

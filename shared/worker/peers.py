"""Which other workers this one exchanges KV with, and how that changes."""

from __future__ import annotations

from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.protocol.cluster import Role, WorkerRecord
from phloem.shared.protocol.engine import PeerDown, PeerUp
from phloem.shared.protocol.session import PeerRef

# A prefill worker hands over to whoever can decode, a unified one only to decode workers: two unified
# workers need no channel, each does both phases.
_TARGETS: dict[Role, tuple[Role, ...]] = {
    "prefill": ("decode", "unified"),
    "decode": (),
    "unified": ("decode",),
}


def hands_over_to(source: WorkerRecord, target: WorkerRecord) -> bool:
    """Whether `source` may send KV to `target`: roles that pair, the same layout, and an address."""
    return (
        target.role in _TARGETS[source.role]
        and target.worker_id != source.worker_id
        and target.kv_layout == source.kv_layout
        and target.transfer_address != ""
    )


class Peers:
    """Turns snapshots into `PeerUp` and `PeerDown`.

    The side that dials hears of both; the other side hears only of losses, so that it can end hand-overs
    that wait for a peer that died before it dialled.
    """

    def __init__(self, own: WorkerRecord) -> None:
        self._own = own
        self._known: dict[PeerRef, str] = {}

    def update(self, snapshot: ClusterSnapshot) -> list[PeerUp | PeerDown]:
        """What the engine must be told after `snapshot`: losses first."""
        dialled = self._addresses(snapshot)
        present = dialled | self._callers(snapshot)
        lost = [PeerDown(peer) for peer in self._known if peer not in present]
        found = [PeerUp(peer, address) for peer, address in dialled.items() if peer not in self._known]
        self._known = present
        return [*lost, *found]

    def _addresses(self, snapshot: ClusterSnapshot) -> dict[PeerRef, str]:
        return {_ref(w): w.transfer_address for w in snapshot.workers if hands_over_to(self._own, w)}

    def _callers(self, snapshot: ClusterSnapshot) -> dict[PeerRef, str]:
        return {_ref(w): "" for w in snapshot.workers if hands_over_to(w, self._own)}


def _ref(record: WorkerRecord) -> PeerRef:
    return PeerRef(record.worker_id, record.epoch)

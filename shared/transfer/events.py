"""What an endpoint tells its engine, in order per channel.

`side` is the part that this process plays in the channel: two unified workers may hold two channels, one
each way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Admitted, Cancel, Last, Piece, Ready

if TYPE_CHECKING:
    from torch import Tensor

    from phloem.shared.transfer.pending import Incoming, SentDigest
    from phloem.shared.transfer.staging import StagingSlot

Side: TypeAlias = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class ChannelOpened:
    """Bytes have gone through; messages may be sent. Comes after the `ChannelLost` of an older channel."""

    peer: PeerRef
    side: Side


@dataclass(frozen=True, slots=True)
class ChannelLost:
    """No event of this channel comes after it. What was under way is lost: fail it or prefill it again.

    Comes once for each `ChannelOpened`; without one only when dialing is of no use (`error.retryable` is
    False: `stale_epoch`, `kv_layout_mismatch`, `link_mismatch`, `same_device`, `bad_address`), and then
    nobody dials the peer again. In all other cases the prefill side dials anew until `peer_down`.
    """

    peer: PeerRef
    side: Side
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class ReadyReceived:
    """Prefill side."""

    peer: PeerRef
    message: Ready


@dataclass(frozen=True, slots=True)
class AdmittedReceived:
    """Prefill side. It came at `at_s` (monotonic), when the engine's thread may have been busy."""

    peer: PeerRef
    message: Admitted
    at_s: float


@dataclass(frozen=True, slots=True)
class SlotAvailable:
    """Prefill side: an `acquire_slot` that gave None would give a slot now."""

    peer: PeerRef


@dataclass(frozen=True, slots=True)
class PieceReceived:
    """Decode side: `data` is a uint8 view [header.num_bytes] of the staging slot, on the endpoint's device.

    The engine owns it until `TransferEndpoint.release`. The digest is not checked yet. With `incoming` the
    bytes are still on their way, and so may be the digest: `sent_digest` will have it, not the header.
    """

    peer: PeerRef
    header: Piece
    data: Tensor
    slot: StagingSlot
    incoming: Incoming | None = None
    sent_digest: SentDigest | None = None

    @property
    def digest(self) -> int | None:
        """The sender's; None: not told yet."""
        return self.header.digest if self.sent_digest is None else self.sent_digest.value

    @property
    def has_come(self) -> bool:
        """All that the sender has to say of it is there, or the device has given it up."""
        return self.digest is not None and (self.incoming is None or self.incoming.done())


@dataclass(frozen=True, slots=True)
class LastReceived:
    """Decode side: every piece sent before it has been delivered before it."""

    peer: PeerRef
    message: Last


@dataclass(frozen=True, slots=True)
class CancelReceived:
    """Ordered with the other messages of the peer."""

    peer: PeerRef
    side: Side
    message: Cancel


TransferEvent: TypeAlias = (
    ChannelOpened
    | ChannelLost
    | ReadyReceived
    | AdmittedReceived
    | SlotAvailable
    | PieceReceived
    | LastReceived
    | CancelReceived
)

"""What a transfer endpoint is told at start."""

from __future__ import annotations

import msgspec

from phloem.shared.protocol.cluster import Role
from phloem.shared.protocol.session import PeerRef

# Measured on 2 x H200 with messages of 64 MiB, for which NCCL takes half of these: 8 CTAs in use give 256
# GB/s, sixty times what prefill makes, and cost the sender's matmuls 1% and the receiver's memory-bound steps
# 4%; 16 in use give 340 and cost the receiver 20% while they last; 4 give half as much and cost the same as 8
# (shared/gpu/README.md).
MAX_CTAS = 16
# NCCL gives a message between two ranks half of a communicator's CTAs, and all of them when it is over 32
# chunks for each of that half. With these chunks no slot is, and a communicator has twice as many CTAs as a
# message may use.
NVLINK_CHUNK_BYTES = 256 * 1024
COMMUNICATOR_CTAS = 2  # for each that a message may use
# Of the GPU, beside staging memory: a communicator of 32 CTAs took 140 to 160 MiB on an H200.
NCCL_BYTES_PER_CTA = 6 * 1024 * 1024
# Nothing crosses while the first piece of a hand-over is gathered, nor while the last one is scattered. While
# the first one crosses, 0.12 ms, the second one is posted and gathered: with 24 MiB the link had to wait.
FIRST_PIECE_BYTES = 36 * 1024 * 1024
LAST_PIECE_BYTES = 16 * 1024 * 1024
# 128 MiB cross in 0.4 ms. A credit is back when decode's host has queued the scatter, mostly before the bytes
# have come; prefill's slot is free when the host has seen them leave, up to 0.2 ms late, and the engine then
# posts the next piece. Two slots would do for the link, the others bear a host that is busy with a step.
STAGING_BYTES = 128 * 1024 * 1024
STAGING_SLOTS = 4
# NCCL made a communicator in 3.8 s where engines were starting on the same host; as a rule it takes 0.1 s.
OPENING_TIMEOUT_S = 10.0
UNIFIED_PEERS = 2  # of a unified worker: most hand nothing over
MAX_PEERS = 8  # of a host of eight GPUs all others, on one side or the other


def default_peers(role: Role) -> int:
    """What `--transfer-peers 0` means."""
    return UNIFIED_PEERS if role == "unified" else MAX_PEERS


def num_staging_blocks(max_peers: int, staging_slots: int) -> int:
    """Blocks of an endpoint's `StagingPool`: one for each peer, and for the first of them all its slots."""
    return max_peers - 1 + staging_slots


def nccl_bytes(max_ctas: int) -> int:
    """Of a GPU's memory, that a channel takes beside its staging memory."""
    return COMMUNICATOR_CTAS * max_ctas * NCCL_BYTES_PER_CTA


def opening_bound_s(timeout_s: float) -> float:
    """What an opening gets where other operations get `timeout_s`: no less, and enough for NCCL on a busy
    host."""
    return max(OPENING_TIMEOUT_S, timeout_s)


class TransferConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an endpoint needs.

    `host` is the one address that the control listener and the group's sockets bind to.
    `kv_layout` and `link` (`link_terms`) must be equal on both sides of a channel, `device_id` (a GPU's own,
    "" for a CPU) must not.
    `staging_bytes` is the size of one slot (a channel takes the smaller of both sides'), `staging_slots` the
    most slots per channel and side, `max_peers` the most peers with a channel at a time, at least one;
    `least_slot_bytes`: smaller slots are of no use. `timeout_s` bounds every operation of a channel: a peer
    that is silent for that long is lost. `max_ctas`: of NCCL. `accepts`: decode and unified workers listen,
    prefill workers don't.

    `opening_timeout_s` bounds the opening of a channel instead, once for joining its plane and once for its
    first byte: NCCL may need seconds for either while nothing is wrong. A peer that dies meanwhile is lost at
    once all the same, by its control connection; one that hangs has the channel's staging memory for up to
    twice that time, and so long steps that need the whole device rest (`may_use_device`). A dialer also gives
    what is left of an opening so long before it begins the next one.
    """

    me: PeerRef
    host: str
    cluster_secret: bytes
    kv_layout: str
    device: str = "cpu"  # "cpu" or "cuda:N"
    device_id: str = ""
    link: str = ""
    staging_bytes: int = STAGING_BYTES
    staging_slots: int = STAGING_SLOTS
    max_peers: int = MAX_PEERS
    least_slot_bytes: int = 1
    max_ctas: int = MAX_CTAS
    timeout_s: float = 10.0
    opening_timeout_s: float = OPENING_TIMEOUT_S
    accepts: bool = False

    @property
    def num_blocks(self) -> int:
        """Blocks of `staging_bytes` that the endpoint allocates."""
        return num_staging_blocks(self.max_peers, self.staging_slots)

    @property
    def bytes_per_peer(self) -> int:
        """Of the device's memory, that one peer more takes."""
        return self.staging_bytes + (0 if self.device == "cpu" else nccl_bytes(self.max_ctas))

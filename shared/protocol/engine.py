"""Front <-> engine of one worker: length-prefixed msgspec frames over a local socket pair.

Down: what the front received, many per frame. Up: one `StepReport` per engine step that made anything, and
replies. A gateway is named by the small number that the front gave its session.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.cluster import WorkerLoad
from phloem.shared.protocol.codec import Codec
from phloem.shared.protocol.session import Output, PeerRef, Submit


class EngineSubmit(msgspec.Struct, frozen=True, tag="submit"):
    gateway: int
    submit: Submit


class EngineAbort(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str
    attempt: int


class AbortGateway(msgspec.Struct, frozen=True, tag="abort_gateway"):
    """The session of this gateway broke: abort all its requests."""

    gateway: int


class PeerUp(msgspec.Struct, frozen=True, tag="peer_up"):
    """A decode-capable worker appeared (prefill and unified engines dial it)."""

    peer: PeerRef
    transfer_address: str


class PeerDown(msgspec.Struct, frozen=True, tag="peer_down"):
    """A worker's lease is lost, or it said goodbye: abort its channel, fail its requests."""

    peer: PeerRef


class FlushCache(msgspec.Struct, frozen=True, tag="flush"):
    """Evict everything from the radix tree that no request holds. Answered by `Reply`."""

    tag: int


class AuditRequest(msgspec.Struct, frozen=True, tag="audit"):
    """Prove that every page has one owner. Answered by `AuditReply`."""

    tag: int


class DumpTree(msgspec.Struct, frozen=True, tag="dump_tree"):
    """Answered by `TreeDump`: the engine sends all block ids held now, for a resync of the index."""

    tag: int


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Abort what is left and exit with 0. The front has drained before."""


EngineMessage: TypeAlias = (
    EngineSubmit
    | EngineAbort
    | AbortGateway
    | PeerUp
    | PeerDown
    | FlushCache
    | AuditRequest
    | DumpTree
    | Stop
)


class EngineDown(msgspec.Struct, frozen=True):
    """One frame towards the engine."""

    messages: list[EngineMessage]


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """Start-up progress, `done` of `total`; `stage` is one of "imports", "flashinfer_kernels" (compiled),
    "weights", "memory" (measured), "cuda_graphs", "warmup"."""

    stage: str
    done: int
    total: int


class EngineReady(msgspec.Struct, frozen=True, tag="ready"):
    """The engine serves. `transfer_address` is "" when it accepts no KV."""

    context_length: int
    page_size: int
    num_pages: int
    kv_layout: str
    kv_bytes_per_token: int
    transfer_address: str
    device: str
    max_running_requests: int


class EngineFailed(msgspec.Struct, frozen=True, tag="engine_failed"):
    """The engine can't start or go on; the process exits after it."""

    error: ErrorInfo


class GatewayOutputs(msgspec.Struct, frozen=True):
    gateway: int
    outputs: list[Output]


class StepReport(msgspec.Struct, frozen=True, tag="step", omit_defaults=True):
    """What one engine step made, grouped by gateway; `stored` and `removed` are block hashes of the tree, in
    order of happening (removed ones were evicted before `stored` ones were inserted, and a block is never in
    both)."""

    step: int
    outputs: list[GatewayOutputs] = []
    stored: list[bytes] = []
    removed: list[bytes] = []
    load: WorkerLoad | None = None


class Reply(msgspec.Struct, frozen=True, tag="reply"):
    tag: int
    error: ErrorInfo | None = None


class AuditReply(msgspec.Struct, frozen=True, tag="audit_reply"):
    """`problems` is empty when every page has one owner. The counts add up to `total_pages`."""

    tag: int
    problems: list[str]
    total_pages: int
    free_pages: int
    tree_pages: int
    request_pages: int
    num_requests: int
    locked_nodes: int
    counters: dict[str, int] = {}  # cumulative: bytes_sent, pages_sent, steps, retractions, ...
    # Prefill side, the latest hand-overs, oldest first: seconds from when token 0 was known here until word
    # came that the decode side has admitted the request.
    exposed_transfer_s: list[float] = []


class TreeDump(msgspec.Struct, frozen=True, tag="tree_dump"):
    """Comes after every `StepReport` whose changes it includes, and before the later ones."""

    tag: int
    block_hashes: list[bytes]


EngineUp: TypeAlias = Progress | EngineReady | EngineFailed | StepReport | Reply | AuditReply | TreeDump

engine_down: Codec[EngineDown] = Codec(EngineDown)
engine_up: Codec[EngineUp] = Codec(EngineUp)

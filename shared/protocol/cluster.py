"""What is registered in Redis about each process, and the load that heartbeats carry."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from phloem.shared.protocol.codec import Codec

Role: TypeAlias = Literal["prefill", "decode", "unified"]
WorkerState: TypeAlias = Literal["ready", "draining"]


class WorkerLoad(msgspec.Struct, frozen=True, omit_defaults=True):
    """A worker's load at its last heartbeat. Rates are moving averages; zero means not measured yet."""

    num_running: int = 0
    num_waiting: int = 0
    queued_tokens: int = 0  # to be computed here for requests accepted: not cached, not a peer's work
    free_pages: int = 0  # free or evictable
    total_pages: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0  # at the present batch
    transfer_bytes_per_s: float = 0.0
    exposed_transfer_s: float = 0.0  # prefill side: from token 0 to word that decode has admitted the request
    tree_pages: int = 0  # owned by the radix tree
    num_handing_over: int = 0  # accepted, neither running nor waiting: KV on its way here or from here
    cut_off: tuple[str, ...] = ()  # ids of workers that it can't hand over to now: no pair with it
    num_channels: int = 0  # KV channels that are open, on either side; not those that open or end
    staging_quarantined_bytes: int = 0  # that lost KV channels have not let go of


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A live worker: the value of its lease in Redis.

    `kv_layout` is a fingerprint of model, dtype, page size and layer shapes; KV moves only between equal
    ones. `transfer_address` ("host:port") is where a decode or unified worker's engine listens for prefill
    peers.
    """

    worker_id: str
    epoch: int
    role: Role
    rpc_address: str  # "host:port" of the front's gRPC server
    model_id: str
    page_size: int
    context_length: int
    kv_layout: str
    kv_bytes_per_token: int = 0
    transfer_address: str = ""
    state: WorkerState = "ready"
    device: str = "cpu"
    max_running_requests: int = 0
    load: WorkerLoad = WorkerLoad()


class ServiceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A live gateway or cache_index replica."""

    kind: Literal["gateway", "cache_index"]
    service_id: str
    epoch: int
    address: str


worker_record: Codec[WorkerRecord] = Codec(WorkerRecord)
service_record: Codec[ServiceRecord] = Codec(ServiceRecord)

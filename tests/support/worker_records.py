"""What a worker registers, for everything that needs one and no worker."""

from __future__ import annotations

from phloem.shared.protocol.cluster import Role, WorkerLoad, WorkerRecord
from phloem.shared.protocol.session import PeerRef

NOWHERE = "127.0.0.1:1"


def new_record(
    worker_id: str = "w",
    role: Role = "prefill",
    *,
    epoch: int = 1,
    rpc_address: str = NOWHERE,
    transfer_address: str = NOWHERE,
    model_id: str = "m",
    context_length: int = 1 << 20,
    kv_layout: str = "kv",
    kv_bytes_per_token: int = 0,
    max_running_requests: int = 0,
    load: WorkerLoad | None = None,
) -> WorkerRecord:
    """A prefill worker has no `transfer_address`, whatever is given. `load` None: idle."""
    return WorkerRecord(
        worker_id=worker_id,
        epoch=epoch,
        role=role,
        rpc_address=rpc_address,
        model_id=model_id,
        page_size=16,
        context_length=context_length,
        kv_layout=kv_layout,
        kv_bytes_per_token=kv_bytes_per_token,
        transfer_address="" if role == "prefill" else transfer_address,
        max_running_requests=max_running_requests,
        load=load or WorkerLoad(),
    )


def record_of(worker: PeerRef) -> WorkerRecord:
    """A prefill worker of this name and epoch."""
    return new_record(worker.worker_id, epoch=worker.epoch)

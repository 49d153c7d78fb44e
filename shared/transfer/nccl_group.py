"""A two-rank `ProcessGroupNCCL`, and what must be set before torch makes one."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupNCCL

from phloem.shared.transfer.errors import channel_lost
from phloem.shared.transfer.interfaces import nccl_binding
from phloem.shared.transfer.link_terms import set_link_terms
from phloem.shared.transfer.planes import RANKS, PlaneSpec
from phloem.shared.transfer.rendezvous import ControlStore

# For torch's abort alone, which waits until NCCL has freed its memory, and so for the device. The deadlines
# of a channel are its own, and for everybody else it has ended when it is aborted.
_ABORT_S = 60.0


def join_group(spec: PlaneSpec, store: ControlStore, max_ctas: int) -> Any:
    """The group of one communicator, which serves both directions: the operations of a channel are in one
    order anyway. `max_ctas`: of the communicator. NCCL blocks until the peer comes. Raises `channel_lost`.

    Any: torch's stubs lack send and recv.
    """
    _prepare_torch()
    set_link_terms()
    _bind_nccl_to(spec.host)
    device = torch.device(spec.device)
    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=max(spec.opening_timeout_s, _ABORT_S))
    options.config.max_ctas = max_ctas
    options.is_high_priority_stream = True  # few and short, among matmuls that fill the device
    try:
        with torch.cuda.device(device):
            group = ProcessGroupNCCL(store, RANKS[spec.side], 2, options)
            group.eager_connect_single_device(device)
            return group
    except RuntimeError as error:
        raise channel_lost(f"the NCCL group can't be made: {error}") from error


def _prepare_torch() -> None:
    """torch's watchdog would end the process when a peer dies; deadlines and aborts are ours. Nor do we need
    the warning that operations of one group are in one order, as they shall, or a stack trace of every
    operation, for which torch waits for the interpreter in the middle of posting it, or to hear once a second
    that our store can't be asked for somebody's wish to dump these. torch reads these when a group is made,
    the last one when the first group is."""
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"
    os.environ["TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING"] = "0"
    os.environ["TORCH_FR_BUFFER_SIZE"] = "0"


def _bind_nccl_to(host: str) -> None:
    """NCCL's bootstrap sockets take an interface, not an address. The operator's own choice stands."""
    if "NCCL_SOCKET_IFNAME" not in os.environ:
        os.environ.update(nccl_binding(host))

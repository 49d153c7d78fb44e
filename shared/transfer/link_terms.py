"""What NCCL's two sides of a channel must have in common, but do not tell each other."""

from __future__ import annotations

import os
from collections.abc import Mapping

from phloem.shared.transfer.config import NVLINK_CHUNK_BYTES

# What cuts a message into chunks and spreads them over CTAs: where they differ, a side waits for chunks that
# the other one never sends.
_VARIABLES = {
    "NCCL_P2P_NVL_CHUNKSIZE": str(NVLINK_CHUNK_BYTES),
    "NCCL_BUFFSIZE": "",
    "NCCL_P2P_LL_THRESHOLD": "",
    "NCCL_NTHREADS": "",
}


def set_link_terms() -> None:
    """For this process's NCCL. The operator's own choice stands.

    With its own chunks of 512 KiB, 128 MiB crossed at 257 GB/s, 256 MiB at 352 (measured, 16 CTAs): NCCL
    gives a message between two ranks half of its CTAs, and all of them when 32 chunks are not enough for each
    of that half.
    """
    for name, value in _VARIABLES.items():
        if value:
            os.environ.setdefault(name, value)


def link_terms(device: str, max_ctas: int) -> str:
    """Of this process's NCCL, for people to read; "" on a CPU, where there are none."""
    if device == "cpu":
        return ""
    import torch

    version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]  # torch does not type it
    return describe_link(version, max_ctas, os.environ)


def describe_link(version: tuple[int, ...], max_ctas: int, environ: Mapping[str, str]) -> str:
    """Equal for sides that fit."""
    values = {name: environ.get(name, value) for name, value in _VARIABLES.items()}
    settings = [f"{name}={value}" for name, value in values.items() if value]
    return ", ".join([f"NCCL {'.'.join(map(str, version))}", f"--transfer-max-ctas {max_ctas}", *settings])

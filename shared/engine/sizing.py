"""How large the KV pool is, and which KV pools fit together."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import torch

from phloem.shared.engine.config import EngineOptions
from phloem.shared.engine.memory import gb, out_of_memory
from phloem.shared.engine.rehearsal import HostGauge
from phloem.shared.errors import ConfigError
from phloem.shared.model_store.model_config import ModelConfig
from phloem.shared.protocol.cluster import Role
from phloem.shared.transfer.config import default_peers, nccl_bytes, num_staging_blocks

CPU_SHARE = 0.125  # of free memory: several workers and the demo's other services share a host
CPU_MAX_TOKENS = 131_072
_SAMPLE_BYTES = 65_536


def host_pool_pages(options: EngineOptions, bytes_per_page: int, context_length: int) -> int:
    """Pages of a CPU worker's KV pool: `--max-total-tokens`, or the share of free memory that
    `--mem-fraction-static` says; without either a share that leaves room for others, and no more than is
    useful.

    Raises `out_of_memory` that names the number to change when not even one page per slot fits.
    """
    if options.max_total_tokens:
        pages = options.max_total_tokens // options.page_size
    else:
        share = options.mem_fraction_static or CPU_SHARE
        pages = int(HostGauge().read().free * share) // bytes_per_page
        if not options.mem_fraction_static:
            pages = min(pages, max(CPU_MAX_TOKENS, context_length) // options.page_size)
    if pages < 2:
        raise out_of_memory(
            f"the KV pool would hold {pages} pages of {options.page_size} tokens "
            f"({gb(bytes_per_page)} each): give --max-total-tokens {4 * options.page_size} or more, or "
            "use a smaller model",
            "max_total_tokens",
        )
    return pages


def transfer_peers(options: EngineOptions, role: Role) -> int:
    """`--transfer-peers`, or what suits the role."""
    return options.transfer_peers or default_peers(role)


def staging_reserve(options: EngineOptions, *, num_peers: int = 0) -> int:
    """Bytes that the transfer endpoint allocates for all its channels, or those of `num_peers`, beside the KV
    pool; the options' `transfer_peers` are set by now."""
    peers = num_peers or options.transfer_peers
    return num_staging_blocks(peers, options.staging_slots) * options.staging_bytes


def channels_reserve(options: EngineOptions, *, num_peers: int = 0) -> int:
    """Bytes of a GPU that channels with all peers, or `num_peers`, take: staging memory, and what NCCL
    allocates for each when it opens. Without room for that a worker would run out of memory when its peers
    come."""
    peers = num_peers or options.transfer_peers
    return staging_reserve(options, num_peers=peers) + peers * nccl_bytes(options.transfer_max_ctas)


def context_length(options: EngineOptions, config: ModelConfig) -> int:
    """The longest prompt + output. Raises `ConfigError` over what the model was made for."""
    if options.context_length > config.context_length:
        raise ConfigError(
            f"--context-length {options.context_length} is over the model's {config.context_length}",
            param="context_length",
        )
    return options.context_length or config.context_length


def kv_layout(model_dir: Path, options: EngineOptions, dtype: torch.dtype) -> str:
    """A fingerprint that is equal only where KV pages mean the same: model, weights, dtype, page size."""
    digest = blake2b(digest_size=16, person=b"phloem-layout")
    digest.update((model_dir / "config.json").read_bytes())
    digest.update(f"{dtype}|{options.page_size}|{options.load_format}".encode())
    if options.load_format != "dummy":
        for path in sorted(model_dir.glob("*.safetensors")):
            digest.update(path.name.encode() + _sample(path))
    return digest.hexdigest()


def _sample(path: Path) -> bytes:
    """Size, head, middle and tail of a weight file: enough to tell two fine-tunes apart, quick to read."""
    size = path.stat().st_size
    parts = [str(size).encode()]
    with path.open("rb") as file:
        for offset in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
            file.seek(offset)
            parts.append(file.read(_SAMPLE_BYTES))
    return b"".join(parts)

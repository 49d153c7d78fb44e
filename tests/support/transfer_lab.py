"""Engine processes with the tiny model, for tests that kill, stop, damage or exchange them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from phloem.shared.engine.config import EngineOptions
from phloem.shared.protocol.session import SamplingParams
from phloem.shared.transfer_bench.lab import Lab, open_lab
from phloem.shared.transfer_bench.models import write_model, write_weights

VOCABULARY = 256
TIMEOUT_S = 1.0  # of transfer operations: a stopped peer is lost after it
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
# One slot of one page of one layer: a prompt of a few hundred tokens goes in a thousand pieces.
SLOW_STAGING = {"staging_bytes": 65_536, "staging_slots": 1}


def tiny_model(folder: Path) -> Path:
    return write_weights(write_model("tiny", folder))


@asynccontextmanager
async def tiny_lab(model_dir: Path, log_dir: Path) -> AsyncIterator[Lab]:
    """CPU engines in float32, which compute alike whoever else is in the batch."""
    options = EngineOptions(
        model_path=str(model_dir),
        dtype="float32",
        num_threads=1,
        max_total_tokens=16_384,
        chunked_prefill_size=256,
        transfer_timeout_s=TIMEOUT_S,
    )
    async with open_lab(options, log_dir) as lab:
        yield lab


def prompt(length: int, seed: int = 1) -> list[int]:
    """Tokens that depend on length and seed."""
    return [2 + (seed * 7919 + n * (n + 31 * seed)) % (VOCABULARY - 2) for n in range(length)]

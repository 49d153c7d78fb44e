"""The entry of a prefill worker."""

from __future__ import annotations

from phloem.shared.worker.config import WorkerConfig
from phloem.shared.worker.front import run_worker


async def run(config: WorkerConfig) -> None:
    """Runs a prefill worker until it has drained. Raises `PhloemError`, as `run_worker` does."""
    await run_worker(config, "prefill")

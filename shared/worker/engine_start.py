"""From a spawned engine to one that serves, with progress in the log."""

from __future__ import annotations

import asyncio

from phloem.shared.errors import PhloemError
from phloem.shared.protocol.engine import EngineFailed, EngineReady, Progress
from phloem.shared.worker.engine_process import EngineProcess
from phloem.shared.worker.progress_log import ProgressLog


async def wait_until_ready(engine: EngineProcess, timeout_s: float) -> EngineReady:
    """Returns what the engine is. Logs its progress.

    Raises `PhloemError`: what the engine reported, `engine_died`, or `engine_start_timeout`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _first_ready(engine)
    except TimeoutError as error:
        raise PhloemError(
            "engine_start_timeout",
            f"the engine was not ready after {timeout_s:.0f} s: raise --engine-start-timeout-s if the model "
            "needs longer to load",
        ) from error


async def _first_ready(engine: EngineProcess) -> EngineReady:
    progress = ProgressLog()
    while True:
        match await engine.receive():
            case EngineReady() as ready:
                return ready
            case EngineFailed(error):
                raise PhloemError.from_info(error)
            case Progress(stage, done, total):
                progress(stage, done, total)
            case other:
                name = type(other).__name__
                raise PhloemError("bad_message", f"the engine sent {name} before it was ready")

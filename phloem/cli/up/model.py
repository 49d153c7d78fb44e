"""The model of `phloem up`, fetched and converted in a process of its own, so that Ctrl-C can end it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

from phloem.cli.up.child_log import Stage, stage_in
from phloem.shared.errors import PhloemError
from phloem.shared.lifecycle.child_process import ChildProcess, spawn_child
from phloem.shared.lifecycle.service import ERROR_PREFIX


async def prepare_model(model_path: str, *, need_weights: bool, on_stage: Callable[[Stage], None]) -> Path:
    """The directory of the model, ready to serve; `phloem pull` does the work.

    Raises `PhloemError` (`model_unavailable`) with what it says. When the caller is cancelled, it is killed
    with all that it started.
    """
    argv = [sys.executable, "-m", "phloem.cli.main", "pull", model_path, "--log-progress"]
    child = await spawn_child(
        "model",
        argv if need_weights else [*argv, "--no-weights"],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        last_line = await _follow(child, on_stage)
        code = await child.wait()
    finally:
        child.kill()
    if code != 0:
        raise PhloemError(
            "model_unavailable", last_line.removeprefix(ERROR_PREFIX) or "the model can't be read"
        )
    return Path(last_line)


async def _follow(child: ChildProcess, on_stage: Callable[[Stage], None]) -> str:
    """Passes stages on; returns the last line that is none: the path, or the error."""
    last_line = ""
    assert child.stdout is not None
    async for raw in child.stdout:
        line = raw.decode(errors="replace").rstrip()
        stage = stage_in(line)
        if stage is not None:
            on_stage(stage)
        elif line:
            last_line = line
    return last_line

"""`phloem pull`: a model into the cache."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from phloem.cli.up.child_log import Stage
from phloem.cli.up.display import Display, LineDisplay, display_for
from phloem.shared.model_store import pull as store
from phloem.shared.model_store.catalog import KNOWN_MODELS
from phloem.shared.model_store.progress import Progress
from phloem.shared.model_store.resolve import default_cache_dir, resolve_model


def pull(
    name: Annotated[
        str, Parameter(help="a known name, a hub id (owner/name), or a GGUF file to convert")
    ] = "smollm2-135m-instruct",
    *,
    weights: Annotated[bool, Parameter(help="refuse a directory without weights")] = True,
    log_progress: Annotated[bool, Parameter(show=False)] = False,
) -> int:
    """Fetch a model, verify it, make it ready to serve, and print where it is."""
    # Progress goes to stderr: stdout holds the path alone.
    console = Console(stderr=True, highlight=False)
    with LineDisplay(console) if log_progress else display_for(console) as display:
        progress: Progress = _log_line if log_progress else _Row(display, name)
        if name in KNOWN_MODELS:
            gguf = store.pull(name, cache_dir=default_cache_dir(), progress=progress)
            display.line(f"GGUF (SHA-256 verified when it was fetched): {gguf}")
        path = resolve_model(name, cache_dir=default_cache_dir(), progress=progress, need_weights=weights)
        display.ready(name)
    print(path)
    return 0


def _log_line(stage: str, done: int, total: int) -> None:
    """Progress for `phloem up`, in the form in which workers log theirs."""
    print(f'stage="{stage}" done={done} total={total}', file=sys.stderr, flush=True)


class _Row:
    """The model store's progress, as the row `name` of a display."""

    def __init__(self, display: Display, name: str) -> None:
        self._display = display
        self._name = name

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._display.stage(self._name, Stage(stage, done, total))

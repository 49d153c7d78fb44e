"""`phloem pull`: a model into the cache."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from phloem.cli.up.child_log import Stage
from phloem.cli.up.display import Display, display_for
from phloem.shared.model_store import pull as store
from phloem.shared.model_store.catalog import KNOWN_MODELS
from phloem.shared.model_store.resolve import default_cache_dir, resolve_model


def pull(
    name: Annotated[
        str, Parameter(help="a known name, a hub id (owner/name), or a GGUF file to convert")
    ] = "smollm2-135m-instruct",
) -> int:
    """Fetch a model, verify it, make it ready to serve, and print where it is."""
    # Progress goes to stderr: stdout holds the path alone.
    with display_for(Console(stderr=True, highlight=False)) as display:
        if name in KNOWN_MODELS:
            gguf = store.pull(name, cache_dir=default_cache_dir(), progress=_Row(display, name))
            display.line(f"GGUF (SHA-256 verified when it was fetched): {gguf}")
        path = resolve_model(name, cache_dir=default_cache_dir(), progress=_Row(display, name))
        display.ready(name)
    print(path)
    return 0


class _Row:
    """The model store's progress, as the row `name` of a display."""

    def __init__(self, display: Display, name: str) -> None:
        self._display = display
        self._name = name

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._display.stage(self._name, Stage(stage, done, total))

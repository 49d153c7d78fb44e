"""What the gateway says about its model."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from phloem.shared.errors import PhloemError


class ServedModel(Struct, frozen=True, kw_only=True):
    """`name` is what requests call it, `path` what the operator gave, `created` a Unix time."""

    name: str
    path: str
    context_length: int
    vocab_size: int
    created: int

    def check_name(self, requested: str | None) -> None:
        """Raises `PhloemError` (404, `model_not_found`) unless `requested` is this model; a request that
        names none means it."""
        if requested and requested != self.name:
            raise PhloemError(
                "model_not_found",
                f"The model {requested[:256]!r} does not exist; this gateway serves {self.name!r}.",
                http_status=404,
                param="model",
            )


def served_name(configured: str, model_path: str) -> str:
    """`configured`, or the last part of a path that exists, or a name or hub id as it was given."""
    path = Path(model_path).expanduser()
    return configured or (path.resolve().name if path.exists() else model_path)

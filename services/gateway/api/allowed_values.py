"""What a field of a request may be, where msgspec's error says only that a value is not one of those."""

from __future__ import annotations

import re
from typing import Any

from msgspec import inspect

_STEP = re.compile(r"\[[^\]]*\]|[^.\[]+")


def allowed_values(body_type: Any, path: str) -> tuple[str, ...]:
    """The literals at `path`, such as `messages[0].role`, within `body_type` (Any: it may be any type
    expression), in order; none where the path leads to something else."""
    found: inspect.Type | None = inspect.type_info(body_type)
    for step in _STEP.findall(path):
        found = next((inner for one in _options(found) if (inner := _within(one, step)) is not None), None)
    literals = (one for one in _options(found) if isinstance(one, inspect.LiteralType))
    return tuple(sorted(str(value) for literal in literals for value in literal.values))


def _options(found: inspect.Type | None) -> tuple[inspect.Type, ...]:
    if found is None:
        return ()
    return found.types if isinstance(found, inspect.UnionType) else (found,)


def _within(outer: inspect.Type, step: str) -> inspect.Type | None:
    """What a field's name, or an index in brackets, leads to."""
    if step.startswith("["):
        return outer.item_type if isinstance(outer, inspect.ListType) else None
    if not isinstance(outer, inspect.StructType):
        return None
    return next((field.type for field in outer.fields if field.encode_name == step), None)

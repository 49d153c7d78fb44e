"""The fields of a configuration struct, as flags, variables and keys of a file.

Nested structs are flattened: a field of a field is a flag of its own, by its own name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, get_type_hints

import msgspec
from msgspec import NODEFAULT, inspect

_SECRET_ENDINGS = ("secret", "password", "api_key", "api_token")
_KIND_WORDS: tuple[tuple[type[inspect.Type], str], ...] = (
    (inspect.BoolType, "BOOL"),
    (inspect.IntType, "INT"),
    (inspect.FloatType, "NUMBER"),
    (inspect.StrType, "TEXT"),
    (inspect.BytesType, "TEXT"),
    (inspect.ListType, "A,B,..."),
    (inspect.VarTupleType, "A,B,..."),
)


class ConfigField(NamedTuple):
    """One flag. `path` leads from the outermost struct to it; `annotation` is what its value must be."""

    path: tuple[str, ...]
    annotation: Any  # a type expression
    kind: inspect.Type
    default: object  # NODEFAULT: required
    description: str

    @property
    def name(self) -> str:
        """snake_case, unique in the struct."""
        return self.path[-1]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is NODEFAULT

    @property
    def is_bool(self) -> bool:
        return isinstance(self.kind, inspect.BoolType)

    @property
    def is_list(self) -> bool:
        return isinstance(self.kind, inspect.ListType | inspect.VarTupleType)

    @property
    def is_secret(self) -> bool:
        return self.name.endswith(_SECRET_ENDINGS)

    @property
    def metavar(self) -> str:
        """What stands for the value in the help."""
        if isinstance(self.kind, inspect.LiteralType):
            return "{" + ",".join(str(value) for value in self.kind.values) + "}"
        return next((word for kind, word in _KIND_WORDS if isinstance(self.kind, kind)), "VALUE")

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values when they are a closed set, else empty."""
        return tuple(map(str, self.kind.values)) if isinstance(self.kind, inspect.LiteralType) else ()

    @property
    def expected(self) -> str:
        """What a value must be, as the end of "expected ..."."""
        return expectation(self.kind)

    def shown(self, value: object) -> str:
        """`value` for a message: a secret is not repeated."""
        return "(hidden)" if self.is_secret else repr(value)


def config_fields(struct: type[msgspec.Struct]) -> list[ConfigField]:
    """All fields of `struct`, nested ones included, in their order. Asserts that names are unique."""
    fields = list(_walk(struct, ()))
    names = [field.name for field in fields]
    assert len(set(names)) == len(names), f"{struct.__name__}: two flags of one name in {sorted(names)}"
    return fields


def _walk(struct: type[msgspec.Struct], prefix: tuple[str, ...]) -> Iterator[ConfigField]:
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    hints = get_type_hints(struct, include_extras=True)
    for field in info.fields:
        kind, description = _unwrapped(field.type)
        path = (*prefix, field.name)
        if isinstance(kind, inspect.StructType):
            yield from _walk(kind.cls, path)
        else:
            yield ConfigField(path, hints[field.name], kind, _default(field), description)


def _unwrapped(kind: inspect.Type) -> tuple[inspect.Type, str]:
    """The type inside metadata and `| None`, and its description."""
    description = ""
    while True:
        if isinstance(kind, inspect.Metadata):
            description = description or (kind.extra_json_schema or {}).get("description", "")
            kind = kind.type
        elif isinstance(kind, inspect.UnionType):
            others = [member for member in kind.types if not isinstance(member, inspect.NoneType)]
            if len(others) != 1:
                return kind, description
            kind = others[0]
        else:
            return kind, description


def _default(field: inspect.Field) -> object:
    if field.default_factory is not NODEFAULT:
        return field.default_factory()
    return field.default


def expectation(kind: inspect.Type) -> str:
    """What a value of `kind` must be, in words: "an integer from 1 to 64"."""
    if isinstance(kind, inspect.LiteralType):
        return "one of " + ", ".join(str(value) for value in kind.values)
    if isinstance(kind, inspect.BoolType):
        return "true or false"
    if isinstance(kind, inspect.IntType):
        return "an integer" + _range(kind)
    if isinstance(kind, inspect.FloatType):
        return "a number" + _range(kind)
    if isinstance(kind, inspect.StrType):
        return "text" + _shape(kind)
    if isinstance(kind, inspect.ListType | inspect.VarTupleType):
        return f"a comma-separated list, each {expectation(_unwrapped(kind.item_type)[0])}"
    return "a valid value"


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    if kind.ge is not None and kind.le is not None:
        return f" from {kind.ge:,} to {kind.le:,}"
    bounds = [
        f"{words} {bound:,}"
        for words, bound in (
            ("at least", kind.ge),
            ("more than", kind.gt),
            ("at most", kind.le),
            ("less than", kind.lt),
        )
        if bound is not None
    ]
    return " " + " and ".join(bounds) if bounds else ""


def _shape(kind: inspect.StrType) -> str:
    parts = []
    if kind.min_length:
        parts.append(f"at least {kind.min_length} characters")
    if kind.max_length is not None:
        parts.append(f"at most {kind.max_length} characters")
    if kind.pattern is not None:
        parts.append(f"matching {kind.pattern}")
    return " " + ", ".join(parts) if parts else ""

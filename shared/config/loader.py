"""Builds a service's frozen configuration: defaults < `phloem.toml` < environment < flags.

In the environment `PHLOEM_GATEWAY_PORT` is the gateway's port, `PHLOEM_PORT` that of any service; where both
are set, the one that names the service wins.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from phloem.shared.config.fields import ConfigField, config_fields
from phloem.shared.config.sources import (
    ENV_PREFIX,
    Setting,
    did_you_mean,
    env_word,
    from_environ,
    from_flags,
    from_toml,
)
from phloem.shared.errors import ConfigError

Config = TypeVar("Config", bound=msgspec.Struct)


def load_config(
    struct: type[Config],
    *,
    section: str,
    toml_path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
    sections: Collection[str] = (),
    foreign_variables: Collection[str] = (),
) -> Config:
    """Returns a `struct` filled from all sources.

    `section` is the service's table in the file and its word in variables; `sections` are those of all
    services. `toml_path` None: no file. `overrides` are flags by field name; text is parsed as on the command
    line. `foreign_variables` are variables without `PHLOEM_` that other parts read.

    Raises `ConfigError` for an unknown key (with a hint), a value of the wrong kind or out of its range (with
    flag, value and range), a missing required value, and what the struct itself refuses (`ValueError`).
    """
    fields = config_fields(struct)
    every_section = {section, *sections}
    settings = from_toml(toml_path, section, fields, every_section) if toml_path is not None else []
    settings += from_environ(environ or {}, section, fields, every_section, foreign_variables)
    settings += from_flags(overrides or {}, fields)
    last = {setting.name: setting for setting in settings}
    _require(fields, last, section)
    values = {field.path: _checked(field, last[field.name]) for field in fields if field.name in last}
    return _built(struct, values, ())


def _require(fields: list[ConfigField], given: Mapping[str, Setting], section: str) -> None:
    for field in fields:
        if field.required and field.name not in given:
            variable = f"{ENV_PREFIX}{env_word(field.name)}"
            raise ConfigError(
                f"{field.flag} is required (or {variable}, or {field.name.replace('_', '-')} in [{section}] "
                "of phloem.toml).",
                param=field.name,
            )


def _checked(field: ConfigField, setting: Setting) -> object:
    """The setting's value as the field's type."""
    value = setting.value
    if setting.is_text and isinstance(field.kind, msgspec.inspect.BytesType):
        return str(value).encode()
    if setting.is_text and field.is_list:
        value = [item.strip() for item in str(value).split(",") if item.strip()]
    try:
        return msgspec.convert(value, field.annotation, strict=not setting.is_text)
    except msgspec.ValidationError as error:
        hint = did_you_mean(str(value), field.choices)
        where = setting.origin if setting.origin == field.flag else f"{setting.origin} ({field.flag})"
        raise ConfigError(
            f"{where}: {field.shown(setting.value)} is not valid: expected {field.expected}.{hint}",
            param=field.name,
        ) from error


def _built(struct: type[Config], values: Mapping[tuple[str, ...], object], prefix: tuple[str, ...]) -> Config:
    """`struct` with those of `values` whose path lies under `prefix`; a nested struct keeps its default's
    other fields."""
    arguments: dict[str, object] = {}
    for field in msgspec.structs.fields(struct):
        path = (*prefix, field.name)
        if path in values:
            arguments[field.name] = values[path]
        elif isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            arguments[field.name] = _built(field.type, values, path)
    try:
        return struct(**arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error

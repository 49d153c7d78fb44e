"""Where configuration values come from: a TOML file, the environment, flags. Values only, not yet checked."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from phloem.shared.config.fields import ConfigField
from phloem.shared.errors import ConfigError

ENV_PREFIX = "PHLOEM_"


class Setting(NamedTuple):
    """A value for the field `name`, and where it was found. Text is parsed; a typed value is not."""

    name: str
    value: object
    origin: str
    is_text: bool


def did_you_mean(word: str, known: Collection[str]) -> str:
    """ " Did you mean X?", or nothing when none is near."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def from_toml(
    path: Path, section: str, fields: Sequence[ConfigField], sections: Collection[str]
) -> list[Setting]:
    """The settings of the table `section`; keys may be written with - or _.

    Raises `ConfigError` for a file that can't be read, a table that no service has, and an unknown key.
    """
    tables = _read_toml(path)
    for table, content in tables.items():
        if table not in sections:
            known = [f"[{name}]" for name in sections]
            raise ConfigError(f"{path}: unknown table [{table}].{did_you_mean(f'[{table}]', known)}")
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: {table} must be a table: [{table}]")
    names = {field.name for field in fields}
    settings = []
    for key, value in dict(tables.get(section, {})).items():
        name = key.replace("-", "_")
        if name not in names:
            hint = did_you_mean(key, [known.replace("_", "-") for known in names])
            raise ConfigError(f"{path}: unknown key {key} in [{section}].{hint}", param=name)
        settings.append(Setting(name, value, f"{path}: [{section}] {key}", is_text=False))
    return settings


def _read_toml(path: Path) -> dict[str, dict[str, object]]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't read the configuration file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def from_environ(
    environ: Mapping[str, str],
    section: str,
    fields: Sequence[ConfigField],
    sections: Collection[str],
    foreign: Collection[str],
) -> list[Setting]:
    """Settings of `PHLOEM_<FIELD>`, then those of `PHLOEM_<SECTION>_<FIELD>`, which come later and so win.

    Variables that name another section are that service's. `foreign` are the variables, without the
    prefix, that mean something to another service. Raises `ConfigError` for one that nobody knows.
    """
    names = {env_word(field.name): field.name for field in fields}
    own = env_word(section) + "_"
    others = tuple(env_word(other) + "_" for other in sections if other != section)
    general, specific = [], []
    for variable, value in _phloem_variables(environ):
        word = variable.removeprefix(ENV_PREFIX)
        if word in names:
            general.append(Setting(names[word], value, variable, is_text=True))
        elif word.startswith(own) and word.removeprefix(own) in names:
            specific.append(Setting(names[word.removeprefix(own)], value, variable, is_text=True))
        elif word.startswith(own) or not (word in foreign or word.startswith(others)):
            known = [ENV_PREFIX + start + name for name in names for start in ("", own)]
            raise ConfigError(f"unknown environment variable {variable}.{did_you_mean(variable, known)}")
    return general + specific


def _phloem_variables(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    return ((name, value) for name, value in sorted(environ.items()) if name.startswith(ENV_PREFIX))


def env_word(name: str) -> str:
    """`cache-index` -> `CACHE_INDEX`."""
    return name.replace("-", "_").upper()


def from_flags(overrides: Mapping[str, object], fields: Sequence[ConfigField]) -> list[Setting]:
    """Settings of flags, by field name; None is a flag that was not given.

    Raises `ConfigError` for an unknown one.
    """
    flags = {field.name: field.flag for field in fields}
    settings = []
    for name, value in overrides.items():
        if name not in flags:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"unknown flag {flag}.{did_you_mean(flag, flags.values())}", param=name)
        if value is not None:
            settings.append(Setting(name, value, flags[name], is_text=isinstance(value, str)))
    return settings

"""A command line from a configuration struct: flags, help, and the loaded struct."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from cyclopts import Parameter

from phloem.cli.services import SERVICES, UP_SECTION, all_sections
from phloem.shared.config.fields import ConfigField, config_fields
from phloem.shared.config.loader import load_config
from phloem.shared.config.sources import env_word

Config = TypeVar("Config", bound=msgspec.Struct)

CONFIG_FILE = "phloem.toml"
CONFIG_VARIABLE = "CONFIG"  # PHLOEM_CONFIG, which file to read


def struct_command(
    struct: type[Config],
    section: str,
    summary: str,
    body: Callable[[Config, Path | None], int],
) -> Callable[..., int]:
    """A cyclopts command whose flags are the struct's fields; it calls `body` with what all sources say, and
    the configuration file that was read."""

    # Any: cyclopts passes what the signature below describes.
    def command(*, config: str | None = None, **flags: Any) -> int:
        path = config_path(config)
        return body(load_from_all(struct, section, path, flags), path)

    fields = config_fields(struct)
    parameters = [_config_parameter(), *(_parameter(field) for field in fields)]
    # cyclopts reads flags off the signature: one that is made here, as the struct is only known now.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = summary
    return command


def load_from_all(
    struct: type[Config], section: str, path: Path | None, flags: Mapping[str, object]
) -> Config:
    """The struct from the file, this process's environment, and flags. Raises `ConfigError`."""
    return load_config(
        struct,
        section=section,
        toml_path=path,
        environ=os.environ,
        overrides=flags,
        sections=all_sections(),
        foreign_variables=_variables_of_other_services(section),
    )


def config_path(given: str | None) -> Path | None:
    """The file to read: the flag's, `PHLOEM_CONFIG`'s, or phloem.toml in this directory if there is one."""
    named = given or os.environ.get(f"PHLOEM_{CONFIG_VARIABLE}")
    if named:
        return Path(named)
    here = Path(CONFIG_FILE)
    return here if here.is_file() else None


def _variables_of_other_services(section: str) -> Collection[str]:
    """Words after PHLOEM_ that mean something to another service: `PHLOEM_MODEL_PATH` in a gateway's
    environment is no mistake, `PHLOEM_MODEL_PAHT` is."""
    from phloem.cli.up.config import UpConfig

    structs = {spec.load_struct() for spec in SERVICES if spec.name != section}
    if section != UP_SECTION:
        structs.add(UpConfig)
    words = {env_word(field.name) for struct in structs for field in config_fields(struct)}
    return words | {CONFIG_VARIABLE}


def _config_parameter() -> inspect.Parameter:
    help_text = f"configuration file (PHLOEM_CONFIG; {CONFIG_FILE} of this directory when it exists)"
    annotation = Annotated[str | None, Parameter(name="--config", help=help_text, metavar="FILE")]
    return inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parameter(field: ConfigField) -> inspect.Parameter:
    """Every value is text (or a bool) to cyclopts: the loader converts it, so that flag, file and variable
    are refused with the same words."""
    # Any: cyclopts' parameter takes either.
    value_type: Any = bool | None if field.is_bool else str | None
    parameter = Parameter(
        name=field.flag,
        help=_help(field),
        metavar=None if field.is_bool else field.metavar,
        allow_leading_hyphen=False,
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[value_type, parameter],
    )


def _help(field: ConfigField) -> str:
    if field.required:
        return f"{field.description} [required]"
    if field.is_bool:
        return f"{field.description} [default: {'on' if field.default else 'off'}]"
    if field.is_secret or field.default in (None, "", b"", ()):
        return field.description
    shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    return f"{field.description} [default: {shown}]"

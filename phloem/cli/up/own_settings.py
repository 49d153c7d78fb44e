"""Which workers an operator has configured by themselves, beside the flags of `phloem up`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from phloem.shared.config.sources import ENV_PREFIX, env_word


def sections_that_set(
    field: str, sections: Iterable[str], config_path: Path | None, environ: Mapping[str, str]
) -> frozenset[str]:
    """Of `sections`, those whose table of the file, or whose own variable, has `field`. The file has been
    read and checked before."""
    tables = {} if config_path is None else tomllib.loads(config_path.read_text(encoding="utf-8"))
    keys = {field, field.replace("_", "-")}
    return frozenset(
        section
        for section in sections
        if keys & set(tables.get(section, {}))
        or ENV_PREFIX + env_word(section) + "_" + env_word(field) in environ
    )

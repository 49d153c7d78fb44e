"""Where a result goes: looked at before a run that may take an hour, not after it."""

from __future__ import annotations

import os
from pathlib import Path

from phloem.shared.errors import ConfigError


def check_output_path(path: Path, flag: str) -> None:
    """Raises `ConfigError` when the file that `flag` names can't be written: no such directory, or none to
    write to, or a directory itself."""
    folder = path.absolute().parent
    if not os.path.isdir(folder):  # unlike pathlib's, it raises nothing, as for a name that is too long
        raise ConfigError(f"{flag} {path}: there is no such directory")
    if os.path.isdir(path):
        raise ConfigError(f"{flag} {path} is a directory: name a file in it")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ConfigError(f"{flag} {path}: no permission to write there")


def write_output(path: Path, data: bytes) -> None:
    """Raises `ConfigError` when that fails."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"can't write {path}: {error.strerror}") from error

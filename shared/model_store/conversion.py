"""A GGUF becomes a Hugging Face directory once, in a process of its own; the result is kept in the cache."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TypeAlias

import msgspec

from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.model_store.files import fingerprint, locked
from phloem.shared.model_store.progress import Progress

CONVERTER = "phloem.shared.engine.weights.gguf_convert"
CONVERSION_TIMEOUT_S = 1800.0
# Part of the cache key: raise it when the converter writes something else than before.
CONVERTER_VERSION = 1


class ConversionProgress(msgspec.Struct, frozen=True, tag="progress"):
    """One line of the converter's standard output."""

    stage: str
    done: int
    total: int


class ConversionFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The converter's last line when it gives up."""

    error: ErrorInfo


ConversionEvent: TypeAlias = ConversionProgress | ConversionFailed


def converted_dir(gguf: Path, cache_dir: Path) -> Path:
    """Where the directory made from `gguf` is kept; another file of the same name gets another place."""
    return cache_dir / "converted" / f"{gguf.stem}-v{CONVERTER_VERSION}-{fingerprint(gguf)}"


def convert_gguf(gguf: Path, *, cache_dir: Path, progress: Progress) -> Path:
    """The Hugging Face directory (safetensors, tokenizer.json) of `gguf`, made if it is not there yet.

    Never imports torch here. Raises PhloemError: `not_a_model`, `unsupported_model`, `conversion_failed`.
    """
    target = converted_dir(gguf, cache_dir)
    if target.is_dir():
        return target
    with locked(target, CONVERSION_TIMEOUT_S):
        if not target.is_dir():
            _run_converter(gguf, target, progress)
    return target


def _run_converter(gguf: Path, target: Path, progress: Progress) -> None:
    decoder = msgspec.json.Decoder(ConversionEvent)
    command = [sys.executable, "-m", CONVERTER, str(gguf), str(target)]
    failure: ErrorInfo | None = None
    # Its progress is ours to show; bars of the libraries below would only be in the way.
    environment = os.environ | {"TQDM_DISABLE": "1"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        deadline = threading.Timer(CONVERSION_TIMEOUT_S, process.kill)
        deadline.start()
        try:
            for line in process.stdout:
                match decoder.decode(line):
                    case ConversionProgress(stage, done, total):
                        progress(stage, done, total)
                    case ConversionFailed(error):
                        failure = error
        finally:
            deadline.cancel()
    if failure is not None:
        raise PhloemError.from_info(failure)
    if process.returncode != 0 or not target.is_dir():
        message = f"converting {gguf} ended with status {process.returncode}; see the messages above"
        raise PhloemError("conversion_failed", message)

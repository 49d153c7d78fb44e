"""From what the operator calls a model to a directory that the engine and the gateway can read."""

from __future__ import annotations

import re
from pathlib import Path

from phloem.shared.errors import PhloemError
from phloem.shared.model_store.catalog import KNOWN_MODELS
from phloem.shared.model_store.conversion import convert_gguf
from phloem.shared.model_store.files import has_weights, is_gguf
from phloem.shared.model_store.hub import fetch_from_hub
from phloem.shared.model_store.progress import Progress, silent
from phloem.shared.model_store.pull import pull
from phloem.shared.model_store.shapes import is_shape, shape_dir

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def default_cache_dir() -> Path:
    """Where models are kept unless the operator says otherwise."""
    return Path.home() / ".cache" / "phloem" / "models"


def resolve_model(
    model_path: str, *, cache_dir: Path, progress: Progress = silent, need_weights: bool = True
) -> Path:
    """The Hugging Face directory of a model; after the first time, at once.

    model_path: a known short name (fetched), a GGUF file (converted once), a Hugging Face directory, or a
    hub id (fetched). A path that exists is never taken for a name. With `need_weights` false a directory
    may lack safetensors (dummy weights, the gateway), and a shape for benchmarks gets its tokenizer.

    Raises PhloemError: `model_not_found`, `not_a_model`, and those of `pull` and `convert_gguf`.
    """
    path = Path(model_path).expanduser()
    if path.is_dir():
        if is_shape(path):
            return _shape(path, cache_dir, progress, need_weights)
        return _checked_dir(path, need_weights)
    if path.exists():
        return _checked_gguf(path, cache_dir, progress)
    if model_path in KNOWN_MODELS:
        return convert_gguf(
            pull(model_path, cache_dir=cache_dir, progress=progress), cache_dir=cache_dir, progress=progress
        )
    if _HUB_ID.fullmatch(model_path):
        return _checked_dir(fetch_from_hub(model_path, cache_dir, progress), need_weights)
    raise _not_found(model_path)


def _shape(path: Path, cache_dir: Path, progress: Progress, need_weights: bool) -> Path:
    if need_weights:
        message = f"{path} is a shape for benchmarks, without weights: give --load-format dummy with it"
        raise PhloemError("not_a_model", message, param="model_path")
    return shape_dir(path, cache_dir, progress)


def _checked_dir(path: Path, need_weights: bool) -> Path:
    if not (path / "config.json").is_file():
        raise _not_a_model(path, "it holds no config.json")
    if need_weights and not has_weights(path):
        raise _not_a_model(path, "it holds no safetensors")
    return path.resolve()


def _checked_gguf(path: Path, cache_dir: Path, progress: Progress) -> Path:
    if not is_gguf(path):
        raise _not_a_model(path, "it does not begin like a GGUF file")
    return convert_gguf(path.resolve(), cache_dir=cache_dir, progress=progress)


def _not_a_model(path: Path, reason: str) -> PhloemError:
    message = (
        f"{path} is not a model: {reason}. Give a GGUF file, or a Hugging Face directory with config.json, "
        "tokenizer.json and safetensors"
    )
    return PhloemError("not_a_model", message, param="model_path")


def _not_found(model_path: str) -> PhloemError:
    known = ", ".join(KNOWN_MODELS)
    message = (
        f"{model_path!r} is not an existing path, a known name ({known}), or a hub id (owner/name); "
        "check the spelling of --model-path"
    )
    return PhloemError("model_not_found", message, param="model_path")

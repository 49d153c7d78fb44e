"""A model's safetensors: which files there are, and what they store their weights in."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open

from phloem.shared.errors import PhloemError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# The format's names of floating-point dtypes, as torch spells them.
_FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


def shards(model_dir: Path) -> list[Path]:
    """The files, in order. Raises `not_a_model` where there are none."""
    index_path = model_dir / INDEX_FILE
    if index_path.exists():
        index = msgspec.json.decode(index_path.read_bytes(), type=dict[str, msgspec.Raw])
        weight_map = msgspec.json.decode(index["weight_map"], type=dict[str, str])
        return [model_dir / file for file in sorted(set(weight_map.values()))]
    single = model_dir / SINGLE_FILE
    if single.exists():
        return [single]
    message = f"{model_dir} holds no {SINGLE_FILE}; only safetensors are loaded, convert the model first"
    raise PhloemError("not_a_model", message, param="model_path")


def stored_dtype(model_dir: Path) -> str | None:
    """The floating-point dtype of most weights of the first file; None where there is no file, or none that
    can be read, which whoever loads it will tell."""
    try:
        with safe_open(shards(model_dir)[0], framework="pt", device="cpu") as shard:
            counts: Counter[str] = Counter()
            for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = shard.get_slice(name)
                counts[tensor.get_dtype()] += math.prod(tensor.get_shape())
    except (PhloemError, SafetensorError, OSError, msgspec.DecodeError, LookupError):
        return None
    floats = [(count, name) for name, count in counts.items() if name in _FLOATS]
    return _FLOATS[max(floats)[1]] if floats else None

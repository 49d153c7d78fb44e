"""The demo model, small enough to travel to a GPU host without network: 4-bit groups, in two files.

Each matrix becomes groups of 32 weights along its rows, `weight = scale * q` with q in [-8, 7] and a float16
scale whose sign lets the group's largest weight be exactly -8. What comes out is another model than what
went in: it is the reference for itself, so the reference tokens are computed from the unpacked weights.

    blob (xz):  [ header length, 8 bytes ][ header, JSON: list of Entry ][ payloads in the header's order ]
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

GROUP = 32
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHTS_FILE = "model.safetensors"
_LENGTH_BYTES = 8
_XZ_PRESET = 4

Bytes = npt.NDArray[np.uint8]


class Entry(msgspec.Struct, frozen=True):
    """A tensor of the checkpoint, or (without a shape) a file; `num_bytes` of payload."""

    name: str
    num_bytes: int
    shape: tuple[int, ...] | None = None


def pack(model_dir: Path) -> bytes:
    """The model's files and its quantised weights, compressed."""
    entries: list[Entry] = []
    payloads: list[bytes] = []
    for file in MODEL_FILES:
        payloads.append((model_dir / file).read_bytes())
        entries.append(Entry(file, len(payloads[-1])))
    with safe_open(model_dir / WEIGHTS_FILE, framework="pt") as weights:
        for name in sorted(weights.keys()):
            tensor = weights.get_tensor(name)
            payloads.append(_packed(tensor))
            entries.append(Entry(name, len(payloads[-1]), tuple(tensor.shape)))
    header = msgspec.json.encode(entries)
    return lzma.compress(
        len(header).to_bytes(_LENGTH_BYTES, "little") + header + b"".join(payloads), preset=_XZ_PRESET
    )


def unpack(blob: bytes, model_dir: Path) -> None:
    """Writes a Hugging Face directory with bfloat16 safetensors."""
    raw = lzma.decompress(blob)
    model_dir.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for entry, payload in _entries(raw):
        if entry.shape is None:
            (model_dir / entry.name).write_bytes(payload)
        else:
            tensors[entry.name] = _unpacked(payload, entry.shape)
    save_file(tensors, model_dir / WEIGHTS_FILE, metadata={"format": "pt"})


def _entries(raw: bytes) -> Iterator[tuple[Entry, bytes]]:
    start = _LENGTH_BYTES + int.from_bytes(raw[:_LENGTH_BYTES], "little")
    for entry in msgspec.json.decode(raw[_LENGTH_BYTES:start], type=list[Entry]):
        yield entry, raw[start : start + entry.num_bytes]
        start += entry.num_bytes


def _packed(tensor: Tensor) -> bytes:
    """Norms and other vectors as bfloat16; a matrix as all scales, then all weights, two to a byte."""
    if tensor.dim() == 1:
        return bytes(tensor.to(torch.bfloat16).view(torch.uint8).numpy())
    groups = tensor.float().numpy().reshape(-1, GROUP)
    rows = np.arange(len(groups))
    scales = (groups[rows, np.abs(groups).argmax(axis=1)] / -8.0).astype(np.float16)
    divisors = np.where(scales == 0, 1, scales).astype(np.float32)
    codes = (np.clip(np.rint(groups / divisors[:, None]), -8, 7) + 8).astype(np.uint8)
    return bytes(scales) + bytes(codes[:, : GROUP // 2] | codes[:, GROUP // 2 :] << 4)


def _unpacked(payload: bytes, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return torch.frombuffer(bytearray(payload), dtype=torch.bfloat16)
    num_groups = int(np.prod(shape)) // GROUP
    scales = np.frombuffer(payload, np.float16, num_groups).astype(np.float32)
    pairs: Bytes = np.frombuffer(payload, np.uint8, offset=2 * num_groups).reshape(num_groups, GROUP // 2)
    codes = np.concatenate((pairs & 15, pairs >> 4), axis=1).astype(np.float32) - 8.0
    return torch.from_numpy(codes * scales[:, None]).reshape(shape).to(torch.bfloat16)

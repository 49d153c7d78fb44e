"""The demo model for a GPU host without network: two ignored folders that travel in two calls.

    PYTHONPATH=. python scripts/pack_model.py pack [MODEL_DIR]    # .gpu-model-a, .gpu-model-b; takes minutes
    PYTHONPATH=. python scripts/pack_model.py unpack TARGET       # a Hugging Face directory, bfloat16
    PYTHONPATH=. python scripts/pack_model.py check cpu bfloat16  # the engine beside it: DEVICE DTYPE

`pack` quantises the weights (tests/support/model_pack.py) and computes what transformers makes of them in
float32 (tests/support/parity.py); `tests/gpu/test_parity.py` compares the engine with that.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import msgspec

from phloem.shared.engine.config import DtypeName, EngineOptions
from phloem.shared.model_store.resolve import default_cache_dir, resolve_model
from tests.support.built_engine import built_engine
from tests.support.model_pack import pack, unpack
from tests.support.parity import (
    FLOAT32_TIE,
    REFERENCE_FILE,
    find_differences,
    make_reference,
    read_reference,
    table,
)
from tests.support.reference import MAX_TOKENS

ROOT = Path(__file__).parents[1]
FOLDERS = (ROOT / ".gpu-model-a", ROOT / ".gpu-model-b")
PART_FILE = "model.part"
FIRST_PART_BYTES = 14_000_000  # beside the wheels of .gpu in one call of 64 MiB


def make_pack(model_dir: Path) -> None:
    """Writes both folders; the reference is made from the weights as they come out again."""
    blob = pack(model_dir)
    parts = (blob[:FIRST_PART_BYTES], blob[FIRST_PART_BYTES:])
    for folder, part in zip(FOLDERS, parts, strict=True):
        folder.mkdir(exist_ok=True)
        (folder / PART_FILE).write_bytes(part)
        print(f"{folder.name}: {len(part) / 1e6:.1f} MB")
    with tempfile.TemporaryDirectory() as scratch:
        unpack(blob, Path(scratch))
        reference = make_reference(Path(scratch))
    (FOLDERS[0] / REFERENCE_FILE).write_bytes(msgspec.json.encode(reference))
    print(f"{len(reference.cases)} prompts; bfloat16 moves gaps by up to {reference.bfloat16_error:.3f}")


def unpack_to(target: Path) -> None:
    """Writes the model's directory and the reference into `target`."""
    unpack(b"".join((folder / PART_FILE).read_bytes() for folder in FOLDERS), target)
    (target / REFERENCE_FILE).write_bytes((FOLDERS[0] / REFERENCE_FILE).read_bytes())
    print(target)


def check(device: str, dtype: DtypeName) -> None:
    """Prints where an engine's greedy tokens differ from the reference's, and how close the two are there."""
    with tempfile.TemporaryDirectory() as scratch:
        unpack_to(Path(scratch))
        reference = read_reference(Path(scratch) / REFERENCE_FILE)
        with built_engine(EngineOptions(model_path=scratch, device=device, dtype=dtype)) as engine:
            differences = find_differences(engine, reference)
    print(table(differences, FLOAT32_TIE if dtype == "float32" else reference.bfloat16_error))
    num_tokens = len(reference.cases) * MAX_TOKENS
    print(
        f"{dtype} on {device}: {len(differences)} of {num_tokens} tokens differ; transformers' own bfloat16 "
        f"moves gaps by up to {reference.bfloat16_error:.3f}"
    )


def main(arguments: list[str]) -> int:
    match arguments:
        case ["pack"]:
            make_pack(resolve_model("smollm2-135m-instruct", cache_dir=default_cache_dir()))
        case ["pack", model_dir]:
            make_pack(Path(model_dir))
        case ["unpack", target]:
            unpack_to(Path(target))
        case ["check", device, ("float32" | "bfloat16" | "float16") as dtype]:
            check(device, dtype)
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Makes a model directory for dummy weights: a config of `benchmarks/models/` and a tokenizer of its size.

    python benchmarks/models/make_tokenizer.py benchmarks/models/llama-3.1-8b /tmp/llama-3.1-8b

`phloem up` and `phloem bench offline` do this by themselves, in the model cache; this is for other tools.
"""

from __future__ import annotations

import sys
from pathlib import Path

from phloem.shared.model_store.shapes import write_shape


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    vocab_size = write_shape((source / "config.json").read_bytes(), target)
    print(f"{target}: tokenizer of {vocab_size} words")
    return 0


if __name__ == "__main__":
    sys.exit(main())

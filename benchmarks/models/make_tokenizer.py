"""Makes a model directory for dummy weights: a config of `benchmarks/models/` and a tokenizer of its size.

    python benchmarks/models/make_tokenizer.py [--json] benchmarks/models/llama-3.1-8b /tmp/llama-3.1-8b

`phloem up` and `phloem bench offline` do this by themselves, in the model cache; this is for other tools.
With `--json` the words are such as can spell JSON (`shared/engine/offline/made_up_tokenizer.py`), to measure
what grammars cost; without, word `w17` is token 17.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from phloem.shared.engine.offline.made_up_tokenizer import with_tokenizer
from phloem.shared.model_store.shapes import write_shape


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a directory with a config.json")
    parser.add_argument("target", type=Path)
    parser.add_argument("--json", action="store_true", help="a vocabulary that can spell JSON")
    options = parser.parse_args()
    config: bytes = (options.source / "config.json").read_bytes()
    if options.json:
        vocab_size = json.loads(config)["vocab_size"]
        options.target.mkdir(parents=True, exist_ok=True)
        with_tokenizer(options.source, options.target, vocab_size)
    else:
        vocab_size = write_shape(config, options.target)
    print(f"{options.target}: tokenizer of {vocab_size} words")
    return 0


if __name__ == "__main__":
    sys.exit(main())

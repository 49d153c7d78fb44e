"""Makes a model directory for dummy weights: a config of `benchmarks/models/` and a tokenizer of its size.

    python benchmarks/models/make_tokenizer.py benchmarks/models/llama-3.1-8b /tmp/llama-3.1-8b

The tokenizer knows one made-up word per id, so that every token of a random model has a text; it serves
benchmarks that send token ids.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Word `w17` is token 17; what is no such word is token 0."""
    tokenizer = Tokenizer(WordLevel({f"w{n} ": n for n in range(vocab_size)}, unk_token="w0 "))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.decoder = Fuse()
    return tokenizer


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    shutil.copy(source / "config.json", target / "config.json")
    make_tokenizer(config["vocab_size"]).save(str(target / "tokenizer.json"))
    print(f"{target}: tokenizer of {config['vocab_size']} words")
    return 0


if __name__ == "__main__":
    sys.exit(main())

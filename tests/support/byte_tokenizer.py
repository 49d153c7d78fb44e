"""A tokenizer with one token per byte, and two special ones."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import pre_tokenizers

EOS = 257
VOCAB_SIZE = 258


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(token_ids: list[int]) -> str:
    return bytes(token for token in token_ids if token < 256).decode()


def write_tokenizer(folder: Path) -> Path:
    """Writes a `tokenizer.json` whose token b is the byte b; returns `folder`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: _byte_of(letter) for letter in letters}
    special = [
        {"id": token_id, "content": content, "special": True, "single_word": False}
        | {"lstrip": False, "rstrip": False, "normalized": False}
        for token_id, content in ((256, "<|start|>"), (EOS, "<|end|>"))
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def _byte_of(letter: str) -> int:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the rest follows from 256 on, in order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return ord(letter) if ord(letter) in plain else others[ord(letter) - 256]

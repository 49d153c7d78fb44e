"""A vocabulary of any size that can spell JSON, for models without weights: their own tokens are no text.

Byte-level like the real ones: every byte, punctuation as JSON has it, numbers, and made-up words with and
without a space before, so that a grammar's masks are as full, and as dear, as for a real vocabulary.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec

_PUNCTUATION = ('":', '",', '{"', '"}', '"]', '["', "},", "}]", "],", '":"', '","', "{}", "[]", '\\"', "\\n")
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
_SPACE = "\u0120"  # how GPT-2's alphabet writes it


def with_tokenizer(model_dir: Path, folder: Path, vocab_size: int) -> Path:
    """Makes `folder` a model directory with the configuration of `model_dir` and a made-up tokenizer."""
    (folder / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    vocab = {token: token_id for token_id, token in enumerate(itertools.islice(_tokens(), vocab_size))}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    (folder / "tokenizer.json").write_bytes(msgspec.json.encode(tokenizer))
    return folder


def _tokens() -> Iterator[str]:
    """Each once, without end."""
    seen: set[str] = set()
    for token in itertools.chain(_alphabet(), _PUNCTUATION, map(str, range(10, 1000)), _words()):
        if token not in seen:
            seen.add(token)
            yield token


def _alphabet() -> Iterator[str]:
    """The letter of every byte: printable Latin-1 is itself, the rest follows from 256 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    yield from (chr(byte) for byte in sorted(plain))
    yield from (chr(256 + index) for index in range(256 - len(plain)))


def _words() -> Iterator[str]:
    rng = random.Random(0)
    while True:
        word = "".join(rng.choices(_LETTERS, range(len(_LETTERS), 0, -1), k=rng.randint(2, 9)))
        yield from (word, _SPACE + word, word.capitalize())

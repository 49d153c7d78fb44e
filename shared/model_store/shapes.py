"""Model directories without weights, for dummy ones: a shape of config.json, and a tokenizer made for it.

A config.json that says `"phloem_made_up_tokenizer": true` (those of `benchmarks/models/`) gets, in the cache,
a tokenizer of one made-up word per token id and a chat template, so that every token of a random model has a
text and chat works. Prompts that users type become token 0 mostly: measure with token ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import msgspec

from phloem.shared.errors import PhloemError
from phloem.shared.model_store.files import locked
from phloem.shared.model_store.progress import Progress

MARKER = "phloem_made_up_tokenizer"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
_VERSION = "1"  # part of the cache key: raise it when something else is written than before
_TIMEOUT_S = 120.0


def is_shape(model_dir: Path) -> bool:
    """Whether this directory asks for a made-up tokenizer, and has none yet."""
    if (model_dir / "tokenizer.json").exists():
        return False
    try:
        config = msgspec.json.decode((model_dir / "config.json").read_bytes())
    except (OSError, msgspec.DecodeError):
        return False
    return isinstance(config, dict) and config.get(MARKER) is True


def shape_dir(source: Path, cache_dir: Path, progress: Progress) -> Path:
    """The complete directory of the shape `source`, made if it is not there yet; its name is the source's."""
    content = (source / "config.json").read_bytes()
    key = hashlib.sha256(_VERSION.encode() + content).hexdigest()[:16]
    target = cache_dir / "shapes" / key / source.resolve().name
    if not target.is_dir():
        with locked(target, _TIMEOUT_S):
            if not target.is_dir():
                progress("making a tokenizer", 0, 0)
                _make(content, target)
    return target


def write_shape(config: bytes, target: Path) -> int:
    """Writes config, tokenizer and chat template into the directory `target`; returns the vocabulary's size.

    Raises PhloemError `not_a_model` for a config without `vocab_size`.
    """
    vocab_size = json.loads(config).get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise PhloemError("not_a_model", f"{target}: the config has no vocab_size", param="model_path")
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_bytes(config)
    (target / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (target / "tokenizer.json").write_text(_tokenizer_json(vocab_size))
    return vocab_size


def _make(config: bytes, target: Path) -> None:
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".making-"))
    try:
        write_shape(config, scratch / target.name)
        os.rename(scratch / target.name, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _tokenizer_json(vocab_size: int) -> str:
    """Word `w17` is token 17; what is no such word is token 0."""
    # Imported here: most models bring a tokenizer of their own.
    from tokenizers import Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({f"w{n} ": n for n in range(vocab_size)}, unk_token="w0 "))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.decoder = Fuse()
    return str(tokenizer.to_str())

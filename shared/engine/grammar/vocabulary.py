"""What a tokenizer's tokens stand for, as xgrammar wants to know it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from xgrammar import TokenizerInfo, VocabType

from phloem.shared.errors import PhloemError


def tokenizer_info(model_dir: Path, vocab_size: int, stop_token_ids: Sequence[int]) -> TokenizerInfo:
    """Of the `tokenizer.json` in `model_dir`; `vocab_size` is the model's, which may be padded.

    Special tokens stand for nothing, so that no grammar ever lets one through as text.
    Raises `PhloemError`: there is no tokenizer.
    """
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise PhloemError("grammar_unavailable", "the model comes without a tokenizer.json", http_status=400)
    parsed: dict[str, Any] = msgspec.json.decode(path.read_bytes())  # Any: a foreign file's shape
    return TokenizerInfo(
        _tokens(parsed, vocab_size),
        _vocab_type(parsed),
        vocab_size=vocab_size,
        stop_token_ids=list(stop_token_ids),
        add_prefix_space=_adds_space(parsed),
    )


def _tokens(parsed: dict[str, Any], vocab_size: int) -> list[str]:
    vocab = parsed["model"]["vocab"]
    by_id = {token[0]: i for i, token in enumerate(vocab)} if isinstance(vocab, list) else vocab
    tokens = [""] * vocab_size
    for token, token_id in by_id.items():
        if token_id < vocab_size:
            tokens[token_id] = token
    for added in parsed.get("added_tokens") or ():
        if added["id"] < vocab_size:
            tokens[added["id"]] = "" if added.get("special") else added["content"]
    return tokens


def _vocab_type(parsed: dict[str, Any]) -> VocabType:
    kinds = _kinds(parsed.get("decoder")) | _kinds(parsed.get("pre_tokenizer"))
    if "ByteLevel" in kinds:
        return VocabType.BYTE_LEVEL
    return VocabType.BYTE_FALLBACK if "ByteFallback" in kinds else VocabType.RAW


def _kinds(part: dict[str, Any] | None) -> set[str]:
    """Type names of a decoder or pre-tokenizer and of what it is made of."""
    if not part:
        return set()
    inner = part.get("decoders") or part.get("pretokenizers") or ()
    return {part["type"]}.union(*(_kinds(each) for each in inner))


def _adds_space(parsed: dict[str, Any]) -> bool:
    normalizer, splitter = parsed.get("normalizer") or {}, parsed.get("pre_tokenizer") or {}
    parts = [normalizer, *(normalizer.get("normalizers") or ())]
    if any(part.get("type") == "Prepend" for part in parts):
        return True
    return splitter.get("type") == "Metaspace" and splitter.get("prepend_scheme", "always") != "never"

"""A model that only has a tokenizer: made-up English-like text, byte-level BPE as real models use."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_CONFIG = Path(__file__).parent.parent / "models" / "llama-3.1-8b" / "config.json"
_SPECIAL = ("<|begin|>", "<|end|>")
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
)


def make_model(path: Path) -> list[int]:
    """Writes the model's files into `path`; returns the tokens that workers answer with, a text of words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(2000)]
    text = " ".join(rng.choices(words, k=20_000))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"bos_token": _SPECIAL[0], "eos_token": _SPECIAL[1], "chat_template": _TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(_CONFIG, path / "config.json")
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids[:4096]


def text_of(path: Path, token_ids: list[int]) -> str:
    text: str = Tokenizer.from_file(str(path / "tokenizer.json")).decode(token_ids)
    return text

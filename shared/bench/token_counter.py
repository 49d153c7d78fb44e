"""A tokenizer as an independent witness of token counts."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from phloem.shared.errors import ConfigError


class TokenCounter:
    """A `tokenizer.json`, without special tokens, padding or truncation."""

    def __init__(self, path: Path) -> None:
        """`path` is the file or the directory that holds it. Raises `ConfigError`."""
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"--tokenizer: there is no {file}")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ConfigError(f"--tokenizer: {file} can't be read: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def count(self, text: str) -> int:
        """Tokens in `text`."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def ordinary_ids(self) -> list[int]:
        """The ids that stand for text, ascending: the vocabulary without control tokens."""
        added = self._tokenizer.get_added_tokens_decoder()
        return sorted(set(self._tokenizer.get_vocab(with_added_tokens=False).values()) - set(added))

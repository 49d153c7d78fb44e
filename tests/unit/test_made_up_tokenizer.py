"""The vocabulary of models without weights: of the size asked for, and able to spell the bench's JSON."""

from __future__ import annotations

from pathlib import Path

import pytest
from xgrammar import GrammarCompiler, GrammarMatcher

from phloem.shared.engine.grammar.compiler_main import compile_grammar
from phloem.shared.engine.grammar.vocabulary import tokenizer_info
from phloem.shared.engine.offline.driver import ENDLESS_JSON
from phloem.shared.engine.offline.made_up_tokenizer import with_tokenizer


@pytest.mark.parametrize("vocab_size", [300, 5000])
def test_every_token_is_text_and_json_can_be_spelled(tmp_path: Path, vocab_size: int) -> None:
    source = tmp_path / "model"
    folder = tmp_path / "served"
    source.mkdir()
    folder.mkdir()
    (source / "config.json").write_text("{}")
    info = tokenizer_info(with_tokenizer(source, folder, vocab_size), vocab_size, ())
    tokens = info.decoded_vocab
    assert len(set(tokens)) == vocab_size and b"" not in tokens
    assert (folder / "config.json").read_text() == "{}"
    matcher = GrammarMatcher(compile_grammar(GrammarCompiler(info, max_threads=1), ENDLESS_JSON))
    text = b'{"name": "a\\n\xc3\xa9", "age": 10.5, "tags": ["x", ""]}, {"name": "'
    assert all(matcher.accept_token(tokens.index(bytes([byte]))) for byte in text)
    assert not matcher.is_terminated()

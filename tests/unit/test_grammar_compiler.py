"""Grammars are compiled apart: what can't be compiled fails alone, what never ends is killed."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from xgrammar import GrammarCompiler, GrammarMatcher, TokenizerInfo, VocabType

from phloem.shared.engine.grammar.compiler_main import answer
from phloem.shared.engine.grammar.process_compiler import CompilerSettings, ProcessCompiler
from phloem.shared.engine.grammar.vocabulary import tokenizer_info
from phloem.shared.engine.grammar.wire import CompilerSocket, Rejected
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import Grammar
from tests.support.byte_tokenizer import EOS, VOCAB_SIZE, encode, write_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def compiler(model_dir: Path) -> Iterator[ProcessCompiler]:
    compiler = ProcessCompiler(CompilerSettings(model_dir, VOCAB_SIZE, (EOS,), compile_timeout_s=2.0))
    yield compiler
    compiler.close()


def accepts(compiler: ProcessCompiler, grammar: Grammar, text: str) -> bool:
    matcher = GrammarMatcher(compiler.compile(grammar))
    return all(matcher.accept_token(token) for token in [*encode(text), EOS])


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (Grammar("json_object"), '{"a": [1, {"b": null}]}', "[1]"),
        (Grammar("json_schema", '{"type": "integer"}'), "-17", '"17"'),
        (Grammar("regex", "[a-c]+@d"), "abc@d", "abd"),
        (Grammar("ebnf", 'root ::= "yes" | "no"'), "no", "nope"),
    ],
)
def test_each_kind_accepts_its_own(compiler: ProcessCompiler, grammar: Grammar, good: str, bad: str) -> None:
    assert accepts(compiler, grammar, good)
    assert not accepts(compiler, grammar, bad)


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{"),
        Grammar("json_schema", '{"type": "wish"}'),
        Grammar("regex", "(["),
        Grammar("ebnf", "root ::= missing"),
    ],
)
def test_bad_grammar_is_refused_and_the_compiler_goes_on(compiler: ProcessCompiler, grammar: Grammar) -> None:
    with pytest.raises(PhloemError) as caught:
        compiler.compile(grammar)
    assert caught.value.code == "bad_grammar" and caught.value.info.http_status == 400
    assert not caught.value.retryable
    assert ".cc" not in str(caught.value)  # where in the library's source says nothing to a client
    assert accepts(compiler, Grammar("regex", "x"), "x")


def test_compiler_that_takes_too_long_is_killed_and_started_again(compiler: ProcessCompiler) -> None:
    compiler.compile(Grammar("regex", "a"))
    assert compiler._child is not None
    first = compiler._child.process
    first.send_signal(signal.SIGSTOP)  # it will never answer
    with pytest.raises(PhloemError, match="took longer than 2 s"):
        compiler.compile(Grammar("regex", "b"))
    assert first.returncode is not None
    assert accepts(compiler, Grammar("regex", "c"), "c")


def test_compiler_that_was_killed_while_idle_costs_no_request(compiler: ProcessCompiler) -> None:
    compiler.compile(Grammar("regex", "a"))
    assert compiler._child is not None
    compiler._child.process.kill()
    compiler._child.process.wait()
    assert accepts(compiler, Grammar("regex", "b"), "b")


def test_end_that_left_without_reading_is_the_end() -> None:
    ours, theirs = socket.socketpair()
    wire = CompilerSocket(ours)
    wire.send(Grammar("regex", "a"))
    theirs.close()  # Linux resets a connection whose last bytes nobody has read
    with pytest.raises(EOFError):
        wire.read_answer(time.monotonic() + 10.0)
    wire.close()


def test_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(PhloemError, match=r"tokenizer\.json") as caught:
        tokenizer_info(tmp_path, VOCAB_SIZE, (EOS,))
    assert caught.value.code == "grammar_unavailable"


def test_grammar_that_no_token_begins_is_refused() -> None:
    info = TokenizerInfo(["w0 ", "w1 ", "</s>"], VocabType.RAW, stop_token_ids=[2])
    found = answer(GrammarCompiler(info, max_threads=1), Grammar("json_object"))
    assert found == Rejected("no token of the model begins what it allows")


def test_special_tokens_are_never_text(model_dir: Path) -> None:
    info = tokenizer_info(model_dir, VOCAB_SIZE + 5, (EOS,))
    assert info.vocab_size == VOCAB_SIZE + 5
    assert info.decoded_vocab[ord("a")] == b"a"
    assert set(info.special_token_ids) >= {256, *range(VOCAB_SIZE, VOCAB_SIZE + 5)}

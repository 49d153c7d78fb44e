"""The grammar compiler: `python -m phloem.shared.engine.grammar.compiler_main --fd N`, an engine's child.

A process of its own, because a grammar comes from a stranger: it may take for ever, or all memory. The
engine kills it when it does; only the one request fails.
"""

from __future__ import annotations

import argparse
import re
import resource
import signal
import socket
import sys
from pathlib import Path

from xgrammar import CompiledGrammar, GrammarCompiler, GrammarMatcher, allocate_token_bitmask

from phloem.shared.engine.grammar.vocabulary import tokenizer_info
from phloem.shared.engine.grammar.wire import Compiled, CompilerSocket, Rejected, Vocabulary
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import Grammar

_MAX_MORE_BYTES = 4 << 30  # than this process has when it is ready
_MAX_COMPILE_S = 60
# Its messages begin with time and place in its source: "[02:25:19] /project/cpp/regex_converter.cc:83: ".
_WHERE_IN_LIBRARY = re.compile(r"\[[\d:]+\] \S+:\d+: ")
_ANY_OBJECT = '{"type": "object", "additionalProperties": true}'


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="phloem-grammar-compiler")
    parser.add_argument("--fd", type=int, required=True, help="the socket to the engine")
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--stop-token-ids", default="", help="with commas")
    options = parser.parse_args(argv)
    wire = CompilerSocket(socket.socket(fileno=options.fd))
    stop_token_ids = [int(item) for item in options.stop_token_ids.split(",") if item]
    try:
        info = tokenizer_info(Path(options.model_path), options.vocab_size, stop_token_ids)
    except PhloemError as error:
        wire.send(Rejected(error.info.message))
        return 1
    wire.send(Vocabulary(info.serialize_json()))
    _bound_memory(_MAX_MORE_BYTES)
    # The engine keeps what was compiled.
    compiler = GrammarCompiler(info, max_threads=2, cache_enabled=False)
    try:
        while True:
            grammar = wire.read_grammar()
            signal.alarm(_MAX_COMPILE_S)  # ends this process, should the engine not be there to do it
            wire.send(answer(compiler, grammar))
            signal.alarm(0)
    except EOFError:
        return 0


def _bound_memory(more_bytes: int) -> None:
    """What is allocated past the bound fails, as a `MemoryError` or with the process."""
    with open("/proc/self/status") as status:
        used_kib = next(int(line.split()[1]) for line in status if line.startswith("VmData:"))
    limit = 1024 * used_kib + more_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def answer(compiler: GrammarCompiler, grammar: Grammar) -> Compiled | Rejected:
    """What the engine is told of its grammar."""
    try:
        compiled = compile_grammar(compiler, grammar)
        if not _can_begin(compiled):
            return Rejected("no token of the model begins what it allows")
        return Compiled(compiled.serialize_json())
    except (RuntimeError, ValueError, MemoryError) as error:
        return Rejected(_first_line(_WHERE_IN_LIBRARY.sub("", str(error))) or type(error).__name__)


def _can_begin(compiled: CompiledGrammar) -> bool:
    bitmask = allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
    GrammarMatcher(compiled).fill_next_token_bitmask(bitmask)
    return bool((bitmask != 0).any())


def compile_grammar(compiler: GrammarCompiler, grammar: Grammar) -> CompiledGrammar:
    """Raises `RuntimeError` or `ValueError`: not a grammar of its kind, or one that can't be followed."""
    match grammar.kind:
        case "json_object":
            return compiler.compile_json_schema(_ANY_OBJECT, max_whitespace_cnt=8)
        case "json_schema":
            return compiler.compile_json_schema(grammar.source, max_whitespace_cnt=8)
        case "regex":
            return compiler.compile_regex(grammar.source)
        case "ebnf":
            return compiler.compile_grammar(grammar.source)


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]


if __name__ == "__main__":
    sys.exit(main())

"""Grammars compiled in a process that can be killed: one at a time, each within a deadline."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from xgrammar import CompiledGrammar, TokenizerInfo

from phloem.shared.engine.grammar.wire import Compiled, CompilerSocket, Rejected, Vocabulary
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import Grammar

START_TIMEOUT_S = 60.0  # importing torch from a cold disk; less than a silent engine is given
COMPILE_TIMEOUT_S = 10.0
# The child computes nothing with torch: no GPU, and no threads that wait for work.
_SMALL = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_MODULE = "phloem.shared.engine.grammar.compiler_main"


class CompilerSettings(NamedTuple):
    model_dir: Path
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    compile_timeout_s: float = COMPILE_TIMEOUT_S


class _Child(NamedTuple):
    process: subprocess.Popen[bytes]
    wire: CompilerSocket
    info: TokenizerInfo


class ProcessCompiler:
    """Starts its process with the first grammar, and anew after it was killed."""

    def __init__(self, settings: CompilerSettings) -> None:
        self._settings = settings
        self._child: _Child | None = None

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Waits for the child, within its deadline. Raises `PhloemError` (400, `bad_grammar`) with the
        compiler's words, or when the child had to be killed; the next grammar starts another."""
        if self._child is not None and self._child.process.poll() is not None:
            self.close()  # killed while it had nothing to do: not this grammar's fault
        child = self._child = self._child or self._start()
        try:
            child.wire.send(grammar, self._settings.compile_timeout_s)
            answer = child.wire.read_answer(time.monotonic() + self._settings.compile_timeout_s)
        except TimeoutError as error:
            self.close()
            raise _bad_grammar(
                f"it took longer than {self._settings.compile_timeout_s:g} s to compile"
            ) from error
        except EOFError as error:
            self.close()
            raise _bad_grammar("its compilation ended for want of memory, or by a crash") from error
        if isinstance(answer, Rejected):
            raise _bad_grammar(answer.message)
        assert isinstance(answer, Compiled), "a compiler describes its vocabulary once"
        return CompiledGrammar.deserialize_json(answer.grammar, child.info)

    def close(self) -> None:
        """Kills the process, whatever it does."""
        child, self._child = self._child, None
        if child is not None:
            child.process.kill()
            child.process.wait()
            child.wire.close()

    def _start(self) -> _Child:
        ours, theirs = socket.socketpair()
        settings = self._settings
        command = [sys.executable, "-m", _MODULE, "--fd", str(theirs.fileno())]
        command += ["--model-path", str(settings.model_dir), "--vocab-size", str(settings.vocab_size)]
        command += ["--stop-token-ids", ",".join(map(str, settings.stop_token_ids))]
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=_environment()
        )
        theirs.close()
        wire = CompilerSocket(ours)
        try:
            answer = wire.read_answer(time.monotonic() + START_TIMEOUT_S)
        except (EOFError, TimeoutError) as error:
            process.kill()
            process.wait()
            wire.close()
            raise PhloemError(
                "grammar_unavailable", "the grammar compiler doesn't start", retryable=True, http_status=503
            ) from error
        if isinstance(answer, Vocabulary):
            return _Child(process, wire, TokenizerInfo.deserialize_json(answer.info))
        process.kill()
        process.wait()
        wire.close()
        message = answer.message if isinstance(answer, Rejected) else "the compiler answers out of turn"
        raise PhloemError("grammar_unavailable", message, http_status=400)


def _environment() -> dict[str, str]:
    """Without what the engine was configured with: secrets are none of a grammar's business."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PHLOEM_")} | _SMALL


def _bad_grammar(why: str) -> PhloemError:
    return PhloemError("bad_grammar", f"the grammar can't be used: {why}", http_status=400)

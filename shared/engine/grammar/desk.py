"""Where grammars are ordered: compiled on a thread, kept, and told of to the engine."""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.session import Grammar

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

log = logging.getLogger(__name__)

MAX_ORDERED = 64
MAX_KEPT = 256
MAX_KEPT_BYTES = 512 * 1024 * 1024
MAX_SOURCE_CHARS = 65_536


class Compiler(Protocol):
    """Called from the desk's thread only."""

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Raises `PhloemError`."""

    def close(self) -> None:
        """Called once; nothing is compiled after that."""


class GrammarReady(NamedTuple):
    """An order is done: exactly one of both is set."""

    grammar: Grammar
    compiled: CompiledGrammar | None
    error: ErrorInfo | None


class _Order:
    """`waiters` say whether who waits has gone. All of it is read and changed under the desk's lock."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.waiters: list[Callable[[], bool]] = []
        self.is_begun = False

    @property
    def is_abandoned(self) -> bool:
        return not self.is_begun and all(is_gone() for is_gone in self.waiters)


class GrammarDesk:
    """Called from the engine's thread only; `deliver` is called from the desk's own.

    An order is dropped when everybody who waited for it has gone before its turn comes.
    """

    def __init__(
        self, make_compiler: Callable[[], Compiler], deliver: Callable[[GrammarReady], None]
    ) -> None:
        self._make_compiler = make_compiler
        self._deliver = deliver
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # for moments only: neither thread ever compiles under it
        self._ordered: dict[Grammar, _Order] = {}  # by the lock; what is dropped is no longer in it
        self._kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()  # the one used last is the last
        self._kept_bytes = 0
        self._thread: threading.Thread | None = None
        self._compiler: Compiler | None = None  # the desk's thread's

    def takes(self, grammar: Grammar) -> bool:
        """Whether it may be ordered: it is known, or not too many wait."""
        with self._lock:
            if len(self._ordered) >= MAX_ORDERED:
                self._ordered = {g: order for g, order in self._ordered.items() if not order.is_abandoned}
            return len(self._ordered) < MAX_ORDERED or grammar in self._ordered or grammar in self._kept

    def find_or_order(self, grammar: Grammar, is_gone: Callable[[], bool]) -> CompiledGrammar | None:
        """A grammar that was compiled before; None: `deliver` will tell, unless `is_gone` (called from any
        thread) says by then that nobody wants to know."""
        compiled = self._kept.get(grammar)
        if compiled is not None:
            self._kept.move_to_end(grammar)
            return compiled
        with self._lock:
            order = self._ordered.get(grammar)
            if order is None:
                order = self._ordered[grammar] = _Order(grammar)
                self._orders.put(order)
            order.waiters.append(is_gone)
        self._start()
        return None

    def done(self, ready: GrammarReady) -> None:
        """What `deliver` brought has reached the engine's thread."""
        with self._lock:
            self._ordered.pop(ready.grammar, None)
        if ready.compiled is None:
            return
        self._kept[ready.grammar] = ready.compiled
        self._kept_bytes += ready.compiled.memory_size_bytes
        while len(self._kept) > MAX_KEPT or (self._kept_bytes > MAX_KEPT_BYTES and len(self._kept) > 1):
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= dropped.memory_size_bytes

    def close(self, timeout_s: float = 15.0) -> None:
        """Ends the thread after the grammar under way, and the compiler with it."""
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join(timeout_s)

    # -- the desk's thread -----------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="grammars", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        try:
            while (order := self._orders.get()) is not None:
                if self._begin(order):
                    self._deliver(self._compile(order.grammar))
        finally:
            self._drop_compiler()

    def _begin(self, order: _Order) -> bool:
        """Whether somebody still waits for it; otherwise it was never ordered."""
        with self._lock:
            if self._ordered.get(order.grammar) is not order:
                return False
            if order.is_abandoned:
                del self._ordered[order.grammar]
                return False
            order.is_begun = True
            return True

    def _compile(self, grammar: Grammar) -> GrammarReady:
        """Every order that is begun is answered: somebody waits for it."""
        try:
            compiler = self._compiler = self._compiler or self._make_compiler()
            return GrammarReady(grammar, compiler.compile(grammar), None)
        except PhloemError as error:
            return GrammarReady(grammar, None, error.info)
        except Exception:  # a bug of ours or of xgrammar's, or no more processes: the next order starts anew
            log.exception("a grammar could not be compiled")
            self._drop_compiler()
            return GrammarReady(grammar, None, _FAILED)

    def _drop_compiler(self) -> None:
        compiler, self._compiler = self._compiler, None
        if compiler is not None:
            compiler.close()


_FAILED = ErrorInfo("grammar_unavailable", "the grammar compiler failed; see the worker's log", True, 503)

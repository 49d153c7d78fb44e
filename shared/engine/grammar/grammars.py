"""The engine's side of grammars: who waits for which, and what became of it."""

from __future__ import annotations

from collections.abc import Callable

from phloem.shared.engine.grammar.desk import MAX_SOURCE_CHARS, GrammarReady
from phloem.shared.engine.grammar.masks import TokenMasks
from phloem.shared.engine.grammar.parts import GrammarParts
from phloem.shared.engine.requests import Request, Status
from phloem.shared.engine.step_plan import StepPlan
from phloem.shared.errors import ErrorInfo, PhloemError, overloaded

_LEFT = ErrorInfo("grammar_violated", "the tokens that came with the request leave its grammar", False, 400)
_STUCK = ErrorInfo("grammar_dead_end", "no token of the model goes on as the grammar demands", False, 400)


class Grammars:
    """Called from the engine's thread only. `fail` ends a request with an error."""

    def __init__(self, parts: GrammarParts | None, fail: Callable[[Request, ErrorInfo], None]) -> None:
        self._parts = parts
        self._fail = fail
        self._waiting: list[Request] = []

    def close(self) -> None:
        if self._parts is not None:
            self._parts.desk.close()

    def check(self, request: Request) -> None:
        """Raises `PhloemError`: this engine follows no grammars, this one is too long, or too many wait."""
        constraint = request.constraint
        if constraint is None:
            return
        if self._parts is None:
            raise PhloemError("grammar_unavailable", "this worker follows no grammars", http_status=400)
        if len(constraint.grammar.source) > MAX_SOURCE_CHARS:
            message = f"a grammar has at most {MAX_SOURCE_CHARS} characters"
            raise PhloemError("bad_grammar", message, http_status=400)
        if not self._parts.desk.takes(constraint.grammar):
            message = "too many grammars wait to be compiled; try again later"
            raise overloaded(message, code="grammar_queue_full")

    def order(self, request: Request) -> None:
        """Sees to it that a queued request's grammar is compiled; the request waits meanwhile."""
        constraint = request.constraint
        if constraint is None or self._parts is None:
            return
        compiled = self._parts.desk.find_or_order(constraint.grammar, lambda: _is_over(request))
        if compiled is not None:
            constraint.begin(compiled)
        else:
            self._waiting = [*(other for other in self._waiting if not _is_over(other)), request]

    def done(self, ready: GrammarReady) -> None:
        """A grammar that was ordered is compiled, or can't be: all that wait for it go on, or fail."""
        assert self._parts is not None
        self._parts.desk.done(ready)
        mine = [request for request in self._waiting if _wants(request, ready)]
        self._waiting = [request for request in self._waiting if not _wants(request, ready)]
        for request in mine:
            if _is_over(request) or request.constraint is None:
                continue
            if ready.compiled is not None:
                request.constraint.begin(ready.compiled)
            elif ready.error is not None:
                self._fail(request, ready.error)

    def masks(self, plan: StepPlan) -> TokenMasks:
        """What the plan's constrained rows allow; requests that left their grammar, or can't go on in it,
        fail before the step makes a token of theirs."""
        assert self._parts is not None, "without grammars no request has a constraint"
        masks, strays, stuck = self._parts.masks.fill(plan)
        for request in strays:
            self._fail(request, _LEFT)
        for request in stuck:
            self._fail(request, _STUCK)
        return masks


def _is_over(request: Request) -> bool:
    """Also asked by the desk's thread: an ended request stays ended."""
    return request.status is Status.ENDED


def _wants(request: Request, ready: GrammarReady) -> bool:
    return request.constraint is not None and request.constraint.grammar == ready.grammar

"""How far a request's answer has come in its grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from phloem.shared.protocol.session import Grammar

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar, GrammarMatcher


class Constraint:
    """Of one request. Until `begin` the request waits for its grammar to be compiled.

    The matcher follows the tokens that are known on the host, whoever made them: a request that is resumed or
    handed over brings them along, and they are followed as if they had been made here.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self._matcher: GrammarMatcher | None = None
        self._num_followed = 0

    @property
    def is_ready(self) -> bool:
        return self._matcher is not None

    @property
    def matcher(self) -> GrammarMatcher:
        assert self._matcher is not None, "the grammar is not compiled yet"
        return self._matcher

    def begin(self, compiled: CompiledGrammar) -> None:
        # xgrammar is imported where the first grammar is compiled, never for an engine without one.
        from xgrammar import GrammarMatcher

        self._matcher = GrammarMatcher(compiled)

    def follow(self, answer: Sequence[int]) -> bool:
        """Takes the tokens of the answer that are new; False: they leave the grammar."""
        for token_id in answer[self._num_followed :]:
            if self.matcher.is_terminated() or not self.matcher.accept_token(token_id):
                return False
            self._num_followed += 1
        return True

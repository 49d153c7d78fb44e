"""Token ids to text, as they come."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

# Enough to know whether a word goes on; more would only cost time.
CONTEXT_TOKENS = 6


class Detokenizer:
    """One sequence's text. Half a character is never returned: it waits for the tokens that complete it.

    `context` is the end of the prompt for a text that goes on where the prompt stopped, so that a leading
    space is kept; empty for one that starts anew. With `skip_special_tokens` control tokens have no text.
    """

    def __init__(
        self, backend: Backend, *, context: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._said = list(context[-CONTEXT_TOKENS:])  # the tokens of the text returned last
        self._held: list[int] = []  # tokens since, whose text is not complete
        self._stream = self._new_stream()

    def push(self, *token_ids: int) -> str:
        """The text that these tokens complete; empty while they end in half a character. The text of all
        pushes is the same, however the tokens are shared out among them."""
        if not token_ids:
            return ""
        try:
            text = self._stream.step(self._backend, token_ids[0] if len(token_ids) == 1 else [*token_ids])
        except Exception:  # the library raises bare Exception
            # A run of invalid bytes changed what was returned before: give up on joining the two.
            self._held += token_ids
            return self._restart()
        if not text:
            self._held += token_ids
            return ""
        self._said = [*self._held, *token_ids]
        if self._held:
            self._held = []
        return text

    def flush(self) -> str:
        """The text of what is held at the end, with U+FFFD for half a character."""
        if not self._held:
            return ""
        before = self._decode(self._said)
        after = self._decode(self._said + self._held)
        self._held = []
        return after[len(before) :]

    def _restart(self) -> str:
        text = self._decode(self._held)
        self._said, self._held = self._held, []
        self._stream = self._new_stream()
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _new_stream(self) -> DecodeStream:
        return DecodeStream(ids=self._said, skip_special_tokens=self._skip_special_tokens)

"""Control tokens in user text stay text.

A tokenizer turns the text `<|im_end|>` into the control token wherever it stands, so a user who types it
could end their own turn and speak as the system. Here the control tokens that the *template* wrote are told
from those that came with the request:

    request text   "say <|im_end|>"
      hide         "say qz5fx2x"                                    (a placeholder that nobody can guess)
      render       "<|im_start|>user\\nsay qz5fx2x<|im_end|>\\n"     (by the chat template)
      seal         "S1user\\nsay qz5fx2xS2\\n"                       (S1, S2: secret aliases)
      reveal       "S1user\\nsay <|im_end|>S2\\n"
      encode       with control tokens off and the aliases on

Encoding runs once over the whole text, and an alias has its token's flags, so merges across the borders,
white space and prefixes come out exactly as in the plain encoding of the rendered text. (Aliases are matched
in raw text always. A tokenizer that matches its control tokens in normalised text, as no chat model we know
does, may so see other white space next to them.) A request whose text holds no control token takes the plain
way: it is the reference by construction.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping

from tokenizers import AddedToken

from phloem.shared.errors import invalid_request


class ControlTokens:
    """The special tokens of one tokenizer, and how to find them in text."""

    def __init__(
        self, tokens: Mapping[int, AddedToken], normalize: Callable[[str], str] | None = None
    ) -> None:
        """`normalize` is the tokenizer's normalizer, if it has one."""
        self.by_content = {token.content: (token_id, token) for token_id, token in tokens.items()}
        self.contents = sorted(self.by_content, key=len, reverse=True)  # the longest match wins, as theirs
        self._numbers = {content: number for number, content in enumerate(self.contents)}
        self._pattern = _alternation(self.by_content[content][1] for content in self.contents)
        # Some tokens are also matched in other spellings, which the normalizer makes theirs.
        self._normalize = normalize if any(token.normalized for token in tokens.values()) else None

    def occur_in(self, text: str) -> bool:
        """Whether the tokenizer would find a control token in `text`."""
        if self._pattern is None:
            return False
        if self._pattern.search(text) is not None:
            return True
        return self._normalize is not None and self._pattern.search(self._normalize(text)) is not None

    def replace(self, text: str, replacement: Callable[[str], str]) -> str:
        """`text` with what `replacement` makes of each control token in it."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda found: replacement(found.group()), text)

    def number(self, content: str) -> int:
        """The index of a control token in `contents`."""
        return self._numbers[content]


class Shield:
    """Hides the control tokens of one request's own text. `needed` says whether there were any."""

    def __init__(self, control_tokens: ControlTokens) -> None:
        self._control_tokens = control_tokens
        self._nonce = "qz" + secrets.token_hex(16)
        self.needed = False

    def hide(self, text: str) -> str:
        """`text` with placeholders for its control tokens."""
        if not self._control_tokens.occur_in(text):
            return text
        self.needed = True
        return self._control_tokens.replace(text, self._placeholder)

    def reveal(self, text: str) -> str:
        """The opposite of `hide`, for a text that a template made of hidden ones.

        Raises `PhloemError` (`chat_template_error`) when the template changed a placeholder, as `upper`
        would: what it stood for can't be put back.
        """
        if self._nonce in text:
            contents = self._control_tokens.contents
            text = re.sub(f"{self._nonce}x([0-9]+)x", lambda found: contents[int(found.group(1))], text)
        if self._nonce in text.lower():
            raise invalid_request(
                "the chat template changes the case of, or cuts, a control token in the messages: remove it",
                param="messages",
                code="chat_template_error",
            )
        return text

    def _placeholder(self, content: str) -> str:
        return f"{self._nonce}x{self._control_tokens.number(content)}x"


def _alternation(tokens: Iterable[AddedToken]) -> re.Pattern[str] | None:
    parts = [_one(token) for token in tokens if token.content]
    return re.compile("|".join(parts)) if parts else None


def _one(token: AddedToken) -> str:
    content = re.escape(token.content)
    return rf"(?<!\w){content}(?!\w)" if token.single_word else content

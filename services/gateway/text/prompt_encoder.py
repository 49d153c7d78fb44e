"""Prompts to token ids; all but short ones off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, TypeVar

from phloem.services.gateway.text.chat_template import ChatTemplate
from phloem.services.gateway.text.control_tokens import Shield
from phloem.services.gateway.text.detokenizer import Detokenizer
from phloem.services.gateway.text.tokenizer import Tokenizer
from phloem.shared.errors import PhloemError, invalid_request, overloaded

Result = TypeVar("Result")
TemplateValue: TypeAlias = str | int | float | bool
Value = TypeVar("Value", str, TemplateValue)

ENCODE_TIMEOUT_S = 60.0
# What is no longer is encoded at once, in about the time that a thread would cost: it has to be woken, and to
# wait until the event loop lets it have the interpreter (up to 5 ms under load).
_SHORT_CHARS = 1024
_SHORT_PARTS = 8
# A text this much longer than the context, in characters per token, is probed before all of it is encoded.
_PROBE_CHARS_PER_TOKEN = 8
_PROBE_SLACK_TOKENS = 64


class PromptEncoder:
    """Owns the threads; `close` it at the end."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, *, num_threads: int) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="encode")

    async def encode_text(self, text: str, *, context_length: int, param: str) -> list[int]:
        """Token ids of a raw prompt, with the tokenizer's own bos; control tokens in it count.

        Raises `PhloemError`: `context_length_exceeded` when the text is far too long (what is only somewhat
        too long is left to the caller to measure), `overloaded` when the threads are busy for too long.
        """

        def encode() -> list[int]:
            self._refuse_far_too_long(text, context_length, param)
            return self._tokenizer.encode(text, add_special_tokens=True)

        return encode() if len(text) <= _SHORT_CHARS else await self._run(encode)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        context_length: int,
        add_generation_prompt: bool,
        extra: Mapping[str, TemplateValue],
    ) -> list[int]:
        """Token ids of `messages` under the chat template; control tokens in them stay text.

        Raises what `encode_text` raises; `chat_template_missing` when the model has none, and
        `chat_template_error` when it refuses the messages.
        """
        template = self._template
        if template is None:
            raise invalid_request(
                "this model has no chat template: use /v1/completions, or start the gateway with "
                "--chat-template",
                param="messages",
                code="chat_template_missing",
            )

        def encode() -> list[int]:
            shield = Shield(self._tokenizer.control_tokens)
            rendered = template.render(
                [_hidden(message, shield) for message in messages],
                add_generation_prompt=add_generation_prompt,
                extra=_hidden(extra, shield),
            )
            self._refuse_far_too_long(rendered, context_length, "messages")
            return self._tokenizer.encode_rendered(rendered, shield)

        return encode() if self._is_short_and_plain([*messages, extra]) else await self._run(encode)

    def _is_short_and_plain(self, parts: Sequence[Mapping[str, TemplateValue]]) -> bool:
        """Whether encoding takes about as long as the way to a thread and back. A control token in a text may
        have to load the sealed tokenizer, which takes long."""
        texts = [text for part in parts for text in part.values() if isinstance(text, str)]
        if sum(map(len, texts)) > _SHORT_CHARS or len(parts) > _SHORT_PARTS:
            return False
        return not any(map(self._tokenizer.control_tokens.occur_in, texts))

    def detokenizer(self, context: Sequence[int], *, skip_special_tokens: bool) -> Detokenizer:
        return Detokenizer(self._tokenizer.backend, context=context, skip_special_tokens=skip_special_tokens)

    def close(self) -> None:
        """Lets running work end and takes no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], Result]) -> Result:
        try:
            async with asyncio.timeout(ENCODE_TIMEOUT_S):
                return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except TimeoutError as error:
            raise overloaded("the tokenizer is busy: try again later") from error

    def _refuse_far_too_long(self, text: str, context_length: int, param: str) -> None:
        """Encoding megabytes costs seconds and hundreds of MiB; a part of the text tells enough. What the
        part's last, cut word may cost too much is far less than the slack."""
        probe_chars = _PROBE_CHARS_PER_TOKEN * context_length
        if len(text) <= 2 * probe_chars:
            return
        at_least = len(self._tokenizer.encode(text[:probe_chars], add_special_tokens=False))
        if at_least - _PROBE_SLACK_TOKENS > context_length:
            raise context_length_exceeded(f"at least {at_least}", None, context_length, param)


def _hidden(values: Mapping[str, Value], shield: Shield) -> dict[str, Value]:
    """`values` with the control tokens of its texts hidden."""
    return {key: shield.hide(value) if isinstance(value, str) else value for key, value in values.items()}


def context_length_exceeded(
    num_prompt_tokens: int | str, max_tokens: int | None, context_length: int, param: str
) -> PhloemError:
    """The 400 that tells all numbers; `max_tokens` None: the request named none."""
    asked = "" if max_tokens is None else f" and max_tokens asks for {max_tokens} more"
    remedy = "shorten it" if max_tokens is None else "shorten it or lower max_tokens"
    return invalid_request(
        f"This model's context length is {context_length} tokens: the prompt has {num_prompt_tokens} tokens"
        f"{asked}. Please {remedy}.",
        param=param,
        code="context_length_exceeded",
    )

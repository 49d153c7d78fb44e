"""Chat templates: jinja in an immutable sandbox, as transformers sets it up, with bounds on time and size."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phloem.shared.errors import ConfigError, PhloemError, invalid_request

# A template repeats the messages, it does not multiply them.
_GROWTH = 4
_FIXED_CHARS = 1_000_000


class ChatTemplate:
    """A compiled template. `render` blocks and may run on several threads at once."""

    def __init__(self, source: str, named_tokens: Mapping[str, str], *, timeout_s: float) -> None:
        """`named_tokens` are `bos_token`, `eos_token` and so on. Raises `ConfigError` on a syntax error."""
        self._environment = _Environment()
        self._named_tokens = dict(named_tokens)
        self._timeout_s = timeout_s
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template is malformed: {error}", param="chat_template") from error

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, str | int | float | bool] | None = None,
    ) -> str:
        """The prompt text of `messages`; `extra` are the request's own template variables, already checked.

        Raises `PhloemError` (400, `chat_template_error`) when the template refuses the messages, fails, or
        passes its bounds on time and output.
        """
        variables: dict[str, Any] = {  # Any: jinja takes whatever the template can print
            **self._named_tokens,
            **(extra or {}),
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        size = sum(len(value) for message in messages for value in message.values())
        self._environment.start_clock(self._timeout_s)
        try:
            return self._joined(variables, _GROWTH * size + _FIXED_CHARS)
        except PhloemError:
            raise
        except Exception as error:  # whatever a template's expression raises is the template's failure
            raise _failure(f"the chat template failed: {error}") from error

    def _joined(self, variables: dict[str, Any], max_chars: int) -> str:
        pieces = []
        num_chars = 0
        for piece in self._template.generate(variables):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > max_chars:
                raise _failure(f"the chat template made more than {max_chars} characters")
            self._environment.check_clock()
        return "".join(pieces)


class _Clock(threading.local):
    """Each thread renders one text at a time."""

    deadline = float("inf")


class _Environment(ImmutableSandboxedEnvironment):
    """Also stops a template that runs too long: every attribute, item and call looks at the clock. A thread
    can't be killed, so the template must be stopped from inside."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
        )
        self._clock = _Clock()
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def start_clock(self, timeout_s: float) -> None:
        self._clock.deadline = time.monotonic() + timeout_s

    def check_clock(self) -> None:
        if time.monotonic() > self._clock.deadline:
            raise _failure("the chat template took too long")

    def getattr(self, obj: Any, attribute: str) -> Any:  # Any: as jinja declares it
        self.check_clock()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: str | Any) -> Any:
        self.check_clock()
        return super().getitem(obj, argument)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.check_clock()
        return super().call(context, obj, *args, **kwargs)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; for serving it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own way to declare it

    def parse(self, parser: Parser) -> Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller: Macro) -> str:
        return caller()


def _failure(message: str) -> PhloemError:
    return invalid_request(message, param="messages", code="chat_template_error")


def _raise_exception(message: object) -> NoReturn:
    raise _failure(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)

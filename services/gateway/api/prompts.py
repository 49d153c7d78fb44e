"""The prompt of a request, in the shapes that the APIs take, checked and made plain."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from phloem.services.gateway.api.openai_types import ChatMessage, ContentPart
from phloem.services.gateway.api.refusals import unsupported
from phloem.services.gateway.gateway import Gateway
from phloem.services.gateway.text.prompt_encoder import TemplateValue
from phloem.shared.errors import PhloemError, invalid_request

_MAX_VARIABLE_CHARS = 256


def chat_messages(messages: Sequence[ChatMessage], most: int) -> list[dict[str, str]]:
    """Messages as chat templates take them: text only, `developer` as `system` (its older name, which every
    template knows). Raises `PhloemError` (400) that names the part at fault."""
    if not messages:
        raise invalid_request(
            "messages is empty: at least one is needed", param="messages", code="empty_array"
        )
    if len(messages) > most:
        raise invalid_request(f"messages has {len(messages)} entries: at most {most}", param="messages")
    return [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]


def completion_prompts(
    prompt: str | Sequence[str | int | list[int]], param: str, most: int
) -> list[str | list[int]]:
    """One entry per prompt. Raises `PhloemError` (400): `empty_prompt`, too many, or mixed kinds."""
    prompts = _split(prompt, param)
    if len(prompts) > most:
        raise invalid_request(f"{param} has {len(prompts)} prompts: at most {most}", param=param)
    for index, one in enumerate(prompts):
        if not one:
            raise _empty(param if len(prompts) == 1 else f"{param}[{index}]")
    return prompts


async def encoded(gateway: Gateway, prompts: Sequence[str | list[int]], param: str) -> list[list[int]]:
    """Token ids of raw prompts; those given as ids are checked against the vocabulary."""
    ids = []
    for index, prompt in enumerate(prompts):
        where = param if len(prompts) == 1 else f"{param}[{index}]"
        if isinstance(prompt, str):
            ids.append(
                await gateway.encoder.encode_text(prompt, context_length=gateway.context_length, param=where)
            )
        else:
            gateway.check_tokens(prompt, where)
            ids.append(prompt)
    return ids


def template_variables(
    given: Mapping[str, TemplateValue] | None, allowed: Collection[str]
) -> Mapping[str, TemplateValue]:
    """The request's template variables. Raises `PhloemError` (400) for a name that the operator does not
    allow, or a long value."""
    for name, value in (given or {}).items():
        param = f"chat_template_kwargs.{name[:64]}"
        if name not in allowed:
            raise unsupported(param)
        if isinstance(value, str) and len(value) > _MAX_VARIABLE_CHARS:
            raise invalid_request(f"{param} is over {_MAX_VARIABLE_CHARS} characters", param=param)
    return given or {}


def _split(prompt: object, param: str) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise _empty(param)
    kinds = {type(entry) for entry in prompt}
    if kinds == {int}:
        return [prompt]
    if kinds in ({str}, {list}):
        return prompt
    raise invalid_request(
        f"{param} mixes texts and token ids: give a text, a list of texts, token ids, or a list of those",
        param=param,
        code="invalid_type",
    )


def _plain(message: ChatMessage, where: str) -> dict[str, str]:
    for field in ("tool_calls", "function_call"):
        if getattr(message, field):
            raise unsupported(f"{where}.{field}")
    role = "system" if message.role == "developer" else message.role
    plain = {"role": role, "content": _text(message, where)}
    return plain | {"name": message.name} if message.name else plain


def _text(message: ChatMessage, where: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role == "assistant":
            return ""
        raise invalid_request(
            f"missing required parameter: {where}.content",
            param=f"{where}.content",
            code="missing_required_parameter",
        )
    return "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))


def _part(part: ContentPart, where: str) -> str:
    if part.type != "text":
        raise unsupported(f"{where}.type", f" {part.type[:64]!r}")
    if part.text is None:
        raise invalid_request(
            f"missing required parameter: {where}.text",
            param=f"{where}.text",
            code="missing_required_parameter",
        )
    return part.text


def _empty(param: str) -> PhloemError:
    return invalid_request(f"{param} is empty", param=param, code="empty_prompt")

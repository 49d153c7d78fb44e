"""Fields that other servers honour and Phloem doesn't (yet): refused when their loss would give wrong
answers, accepted when their value asks for nothing. Fields that nobody knows are ignored, as peers do;
but not among SGLang's sampling parameters, where it refuses them too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeAlias

import msgspec

from phloem.services.gateway.api.json_body import decode_json
from phloem.shared.errors import PhloemError, invalid_request

# Any: a refused field may hold whatever JSON can; only its emptiness is asked.
Harmless: TypeAlias = Callable[[Any], bool]


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _binds_nothing(value: Any) -> bool:
    """An empty schema is one: it allows any JSON, and nothing else."""
    return value is None or value is False or value in ([], "")


def _is_zero(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and value == 0)


def _is_one(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and value == 1)


def _is_text_only(value: Any) -> bool:
    return value is None or value == ["text"]


def _calls_nothing(value: Any) -> bool:
    return value in (None, "none", "auto")


def _is_off(value: Any) -> bool:
    return value is None or value is False


_PENALTIES: dict[str, Harmless] = {
    "frequency_penalty": _is_zero,
    "presence_penalty": _is_zero,
    "repetition_penalty": _is_one,
    "length_penalty": _is_one,
    "min_tokens": _is_zero,
    "min_new_tokens": _is_zero,
    "logit_bias": _is_empty,
    "bad_words": _is_empty,
    "use_beam_search": _is_off,
}
_CONSTRAINTS: dict[str, Harmless] = dict.fromkeys(
    (
        "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs",
        "grammar", "structural_tag", "stop_regex",
    ),
    _binds_nothing,
)  # fmt: skip
_SHARED = {
    **_PENALTIES,
    **_CONSTRAINTS,
    "lora_path": _is_empty,
    "no_stop_trim": _is_off,
    "include_stop_str_in_output": _is_off,
}

CHAT_REFUSALS: Mapping[str, Harmless] = {
    **_SHARED,
    "tools": _is_empty,
    "tool_choice": _calls_nothing,
    "functions": _is_empty,
    "function_call": _calls_nothing,
    "logprobs": _is_off,
    "top_logprobs": _is_zero,
    "modalities": _is_text_only,
    "audio": _is_empty,
    "web_search_options": lambda value: value is None,
    "continue_final_message": _is_off,
    "echo": _is_off,
}
COMPLETION_REFUSALS: Mapping[str, Harmless] = {
    **_SHARED,
    "best_of": _is_one,
    "echo": _is_off,
    "suffix": _is_empty,
    "logprobs": _is_off,  # 0 asks for the chosen token's
    "prompt_logprobs": _is_off,
}
NATIVE_REFUSALS: Mapping[str, Harmless] = {
    "return_logprob": _is_off,
    "image_data": _is_empty,
    "audio_data": _is_empty,
    "video_data": _is_empty,
    "input_embeds": _is_empty,
    "lora_path": _is_empty,
    "return_hidden_states": _is_off,
    "custom_logit_processor": _is_empty,
    "session_params": _is_empty,
}
NATIVE_SAMPLING_REFUSALS: Mapping[str, Harmless] = {
    **_SHARED,
    "custom_params": _is_empty,
    "spaces_between_special_tokens": lambda value: True,  # no tokenizer here adds any
    "stream_interval": lambda value: True,  # events come as soon as there are tokens
}


def refuse_unsupported(body: bytes, refusals: Mapping[str, Harmless], prefix: str = "") -> None:
    """Raises `PhloemError` (400, `unsupported_parameter`) for the first field of the JSON object `body`
    whose value asks for what Phloem can't do."""
    for name, raw in decode_json(body, dict[str, msgspec.Raw]).items():
        harmless = refusals.get(name)
        if harmless is not None and not harmless(decode_json(raw, Any)):
            raise unsupported(prefix + name)


def refuse_unknown(body: bytes, known: Iterable[str], prefix: str) -> None:
    """Raises `PhloemError` (400, `unknown_parameter`) for the first field of the JSON object `body` that is
    not `known`: it would be lost in silence."""
    names = set(known)
    for name in decode_json(body, dict[str, msgspec.Raw]):
        if name not in names:
            close = get_close_matches(name, sorted(names), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise invalid_request(
                f"{prefix}{name[:64]} is not known{hint}", param=prefix + name[:64], code="unknown_parameter"
            )


def unsupported(param: str, what: str = "") -> PhloemError:
    """The 400 for a field, or a value of it, that would be lost in silence."""
    return invalid_request(
        f"{param}{what} is not supported by this server", param=param, code="unsupported_parameter"
    )

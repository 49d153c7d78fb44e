"""Fields that bind an answer to a grammar, checked for shape and size; whether it compiles, a worker says."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec
from msgspec import Struct

from phloem.shared.errors import PhloemError, invalid_request
from phloem.shared.protocol.session import Grammar

MAX_GRAMMAR_CHARS = 65_536
MAX_SCHEMA_DEPTH = 64
_ABOUT_THE_GRAMMAR = ("bad_grammar", "grammar_dead_end")


# Any: a schema is JSON of whatever shape, and only bounded here.
Schema: TypeAlias = dict[str, Any] | bool


class NamedSchema(Struct, frozen=True):
    """OpenAI's wrapping of a schema. Answers always follow it: `strict` false is no less."""

    schema: Schema | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class GrammarFields(Struct, kw_only=True, frozen=True):
    """OpenAI's `response_format`, and SGLang's fields: a schema as JSON text (or as an object), a regular
    expression, a grammar in EBNF. Empty ones are as good as absent."""

    response_format: ResponseFormat | None = None
    json_schema: Schema | str | None = None
    regex: str | None = None
    ebnf: str | None = None


class AskedGrammar(Struct, frozen=True):
    """A grammar, and the field that asks for it."""

    param: str
    grammar: Grammar

    def naming_field(self, error: PhloemError) -> PhloemError:
        """`error`; with the field, which a worker doesn't know, where it is about the grammar."""
        if error.code not in _ABOUT_THE_GRAMMAR or error.info.param is not None:
            return error
        return PhloemError.from_info(msgspec.structs.replace(error.info, param=self.param))


def plan_grammar(fields: GrammarFields, prefix: str = "") -> AskedGrammar | None:
    """The one grammar that the fields ask for. Raises `PhloemError` (400) that names the field."""
    found: list[tuple[str, Grammar]] = []
    if fields.response_format is not None and fields.response_format.type != "text":
        found.append(("response_format", _of_format(fields.response_format, prefix)))
    if fields.json_schema is not None and (text := _schema_text(fields.json_schema, prefix + "json_schema")):
        found.append(("json_schema", Grammar("json_schema", text)))
    if fields.regex:
        found.append(("regex", Grammar("regex", fields.regex)))
    if fields.ebnf:
        found.append(("ebnf", Grammar("ebnf", fields.ebnf)))
    if len(found) > 1:
        names = " and ".join(prefix + name for name, _ in found)
        raise invalid_request(f"{names} exclude each other", param=prefix + found[1][0])
    for name, grammar in found:
        if len(grammar.source) > MAX_GRAMMAR_CHARS:
            raise invalid_request(
                f"{prefix}{name} has {len(grammar.source)} characters: at most {MAX_GRAMMAR_CHARS}",
                param=prefix + name,
            )
        return AskedGrammar(prefix + name, grammar)
    return None


def _of_format(wanted: ResponseFormat, prefix: str) -> Grammar:
    if wanted.type == "json_object":
        return Grammar("json_object")
    param = f"{prefix}response_format.json_schema.schema"
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        raise invalid_request(f"{param} is missing", param=param, code="missing_required_parameter")
    return Grammar("json_schema", _schema_text(wanted.json_schema.schema, param))


def _schema_text(value: Schema | str, param: str) -> str:
    """A schema as JSON text, nested within bounds; "" for none."""
    if value == "":
        return ""
    if isinstance(value, str):
        value = _decoded(value, param)
    if _is_deeper(value, MAX_SCHEMA_DEPTH):
        raise invalid_request(f"{param} is nested deeper than {MAX_SCHEMA_DEPTH} levels", param=param)
    return msgspec.json.encode(value).decode()


def _decoded(text: str, param: str) -> Schema:
    try:
        schema: Schema = msgspec.json.decode(text, type=dict[str, Any] | bool)
    except (msgspec.DecodeError, RecursionError) as error:
        raise invalid_request(f"{param} is no JSON schema: {error}", param=param) from error
    return schema


def _is_deeper(value: Any, levels: int) -> bool:
    """Level by level: no recursion over what a stranger sent."""
    layer = [value]
    for _ in range(levels + 1):
        nested = [part for part in layer if isinstance(part, dict | list)]
        if not nested:
            return False
        layer = [inner for part in nested for inner in (part.values() if isinstance(part, dict) else part)]
    return True

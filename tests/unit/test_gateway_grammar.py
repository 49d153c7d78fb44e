"""Which grammar a request's fields ask for, and the 400 that names the field when they can't be meant."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from phloem.services.gateway.grammar import (
    MAX_GRAMMAR_CHARS,
    MAX_SCHEMA_DEPTH,
    AskedGrammar,
    GrammarFields,
    plan_grammar,
)
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import Grammar

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TEXT = msgspec.json.encode(SCHEMA).decode()


def plan(fields: dict[str, Any]) -> AskedGrammar | None:
    return plan_grammar(msgspec.json.decode(json.dumps(fields), type=GrammarFields), "p.")


def nested(depth: int) -> Any:
    schema: Any = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": None, "regex": "", "ebnf": None, "json_schema": ""}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            Grammar("json_schema", TEXT),
        ),
        ({"json_schema": json.dumps(SCHEMA)}, Grammar("json_schema", TEXT)),
        ({"json_schema": SCHEMA}, Grammar("json_schema", TEXT)),
        ({"json_schema": True}, Grammar("json_schema", "true")),
        ({"regex": "a+"}, Grammar("regex", "a+")),
        ({"ebnf": 'root ::= "a"', "response_format": {"type": "text"}}, Grammar("ebnf", 'root ::= "a"')),
    ],
)
def test_fields_ask_for_a_grammar(fields: dict[str, Any], expected: Grammar | None) -> None:
    asked = plan(fields)
    assert (asked and asked.grammar) == expected
    assert asked is None or asked.param.removeprefix("p.") in fields


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "p.response_format.json_schema.schema"),
        ({"json_schema": "{"}, "p.json_schema"),
        ({"json_schema": "[1]"}, "p.json_schema"),
        ({"json_schema": nested(MAX_SCHEMA_DEPTH + 2)}, "p.json_schema"),
        ({"regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, "p.regex"),
        ({"regex": "a", "ebnf": "b"}, "p.ebnf"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "p.regex"),
    ],
)
def test_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(PhloemError) as caught:
        plan(fields)
    assert caught.value.info.http_status == 400
    assert caught.value.info.param == param


def test_schema_as_deep_as_allowed_is_taken() -> None:
    assert plan({"json_schema": nested(MAX_SCHEMA_DEPTH)}) is not None

"""Grammars over HTTP, across a hand-over: one worker makes token 0 under the grammar, another the rest."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from tests.support.cluster import MODEL_NAME, Cluster

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "likes"],
    "additionalProperties": False,
}
START_S = 180.0  # both workers start their compilers with the first grammar


def test_answer_follows_its_schema(pair: Cluster) -> None:
    answer = (
        pair.openai()
        .with_options(timeout=START_S)
        .chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": "Describe a person as JSON with name and likes."}],
            temperature=0,
            max_tokens=72,
            response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
        )
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert set(found) == {"name", "likes"} and set(found["likes"]) <= {"tea", "coffee"}
    assert answer.choices[0].finish_reason == "stop"


def test_native_api_takes_a_regular_expression(pair: Cluster) -> None:
    body = {"text": "The answer is", "sampling_params": {"regex": " (yes|no)", "max_new_tokens": 8}}
    response = httpx.post(f"{pair.url}/generate", json=body, timeout=START_S)
    assert response.json()["text"] in (" yes", " no")


def test_bad_schema_is_the_clients_fault(pair: Cluster) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        pair.openai().chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=8,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "wish", "schema": {"type": "wish"}},
            },
        )
    assert caught.value.code == "bad_grammar"
    assert "grammar" in caught.value.message

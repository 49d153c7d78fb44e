"""The description of the routes, for programs and as a page that needs nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from phloem.services.gateway.api.schema_page import Field, fields_of, schema_page
from tests.support.gateway import FakeGenerator, in_process, make_gateway


@pytest.fixture
async def page(model_dir: Path, generator: FakeGenerator) -> str:
    async with in_process(make_gateway(model_dir, generator)) as client:
        response = await client.get("/schema")
    assert response.headers["content-type"].startswith("text/html")
    return response.text


async def test_the_schema_describes_the_bodies(model_dir: Path, generator: FakeGenerator) -> None:
    async with in_process(make_gateway(model_dir, generator)) as client:
        schema = (await client.get("/schema/openapi.json")).json()
    operation = schema["paths"]["/v1/chat/completions"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in body["properties"]
    assert "200" in operation["responses"]


async def test_the_page_shows_routes_fields_and_values(page: str) -> None:
    for shown in ("POST /v1/chat/completions", "GET /metrics", "messages[].role", "sampling_params.top_p"):
        assert f"<code>{shown}</code>" in page
    assert "required" in page
    assert "&quot;user&quot;" in page
    assert "list of integer" in page


async def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    assert "<script" not in page
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"/schema/openapi.json"}
    assert "url(" not in page


def test_text_of_a_schema_can_not_break_out_of_the_page() -> None:
    openapi = {
        "info": {"title": "<b>", "version": "1"},
        "paths": {"/<i>": {"get": {"summary": "<script>x</script>", "responses": {}}}},
    }
    page = schema_page(openapi)
    assert not re.search(r"<(b|i|script)>", page)


def test_fields_are_listed_with_those_inside_them() -> None:
    known = {"Inner": {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}}
    reference = {"$ref": "#/components/schemas/Inner"}
    schema = {
        "type": "object",
        "required": ["one"],
        "properties": {
            "one": reference,
            "many": {"anyOf": [{"type": "array", "items": reference}, {"type": "null"}]},
            "plain": {"oneOf": [{"type": "integer"}, {"type": "string"}, {"const": 7}]},
            "nothing": {"type": "null"},
        },
    }
    assert list(fields_of(schema, known)) == [
        Field("one", "object", True),
        Field("one.a", '"x" or "y"', True),
        Field("many", "list of object", False),
        Field("many[].a", '"x" or "y"', True),
        Field("plain", "integer or string or 7", False),
        Field("nothing", "null", False),
    ]

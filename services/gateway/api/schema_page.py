"""The page at /schema: routes and their fields in plain HTML. No script and nothing from elsewhere: it
works without an internet, and nobody else's code runs in the gateway's origin."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from litestar import Request
from litestar.openapi.plugins import OpenAPIRenderPlugin
from msgspec import Struct

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937 }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
code { font: 13px ui-monospace, monospace }
h2 { margin: 2.5rem 0 0; font-size: 1.05rem } h2 code { font-size: 1rem }
p { margin: .2rem 0 .6rem } h3 { margin: 1rem 0 .2rem; font-size: .8rem; color: #6b7280 }
td { padding: .1rem 1.2rem .1rem 0; vertical-align: top } tr { border-bottom: 1px solid #e5e7eb }
table { border-collapse: collapse } .needed { color: #b45309 } a { color: #2563eb }
"""

# Any: a JSON schema, as it was decoded.
Schema = Mapping[str, Any]


class Field(Struct, frozen=True):
    """`path` is like `messages[].role`; `kind` says in words what it may be."""

    path: str
    kind: str
    needed: bool


class SchemaPage(OpenAPIRenderPlugin):
    """Serves the page at the root of the schema's routes, beside openapi.json."""

    def __init__(self) -> None:
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return schema_page(openapi_schema).encode()


def schema_page(openapi: Schema) -> str:
    """`openapi` as an HTML document."""
    title = escape(f"{openapi['info']['title']} {openapi['info']['version']}")
    known = openapi.get("components", {}).get("schemas", {})
    parts = [
        _operation(method, path, operation, known)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f'<h1>{title}</h1><p>The same for programs: <a href="/schema/openapi.json">openapi.json</a></p>'
        f"{''.join(parts)}</body></html>"
    )


def fields_of(schema: Schema, known: Mapping[str, Schema], prefix: str = "") -> Iterator[Field]:
    """The fields of an object, each followed by those within it. `known` has what references name; no body
    is recursive."""
    schema = _object_in(schema, known) or {}
    needed = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        path = prefix + name
        yield Field(path, _kind(field, known), name in needed)
        inner = _object_in(field, known)
        if inner is not None:
            yield from fields_of(inner, known, f"{path}[]." if _is_list(field, known) else f"{path}.")


def _operation(method: str, path: str, operation: Schema, known: Mapping[str, Schema]) -> str:
    summary = escape(operation.get("summary") or "")
    head = f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{summary}</p>"
    body = _json_schema(operation.get("requestBody", {}))
    answer = _json_schema(operation.get("responses", {}).get("200", {}))
    return head + _table("body", body, known) + _table("answer", answer, known)


def _json_schema(holder: Schema) -> Schema:
    found: Schema = holder.get("content", {}).get("application/json", {}).get("schema", {})
    return found


def _table(caption: str, schema: Schema, known: Mapping[str, Schema]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(field.path)}</code></td><td>{escape(field.kind)}</td>"
        f'<td class="needed">{"required" if field.needed and caption == "body" else ""}</td></tr>'
        for field in fields_of(schema, known)
    )
    return f"<h3>{caption}</h3><table>{rows}</table>" if rows else ""


def _options(schema: Schema, known: Mapping[str, Schema]) -> list[Schema]:
    """What a value may be, without null."""
    if "$ref" in schema:
        return _options(known[schema["$ref"].rpartition("/")[2]], known)
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices is None:
        return [] if schema.get("type") == "null" else [schema]
    return [option for choice in choices for option in _options(choice, known)]


def _object_in(schema: Schema, known: Mapping[str, Schema]) -> Schema | None:
    """The object with named fields that a value, or an item of it, may be."""
    for option in _options(schema, known):
        if option.get("properties"):
            return option
        if isinstance(option.get("items"), Mapping) and (inner := _object_in(option["items"], known)):
            return inner
    return None


def _is_list(schema: Schema, known: Mapping[str, Schema]) -> bool:
    return all(not option.get("properties") for option in _options(schema, known))


def _kind(schema: Schema, known: Mapping[str, Schema]) -> str:
    words = [_word(option, known) for option in _options(schema, known)]
    return " or ".join(dict.fromkeys(words)) or "null"


def _word(option: Schema, known: Mapping[str, Schema]) -> str:
    values = option.get("enum") or ([option["const"]] if "const" in option else [])
    if values:
        return " or ".join(json.dumps(value) for value in values)
    if "items" in option:
        return f"list of {_kind(option['items'], known)}"
    kind = option.get("type", "any JSON")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)

"""What handlers share: the gateway, the body, and its description for the OpenAPI page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from litestar.openapi.spec import OpenAPIMediaType, Operation, RequestBody, Schema

from phloem.services.gateway.api.errors import HttpRequest
from phloem.services.gateway.api.json_body import read_body
from phloem.services.gateway.gateway import Gateway


def gateway_of(request: HttpRequest) -> Gateway:
    return cast(Gateway, request.app.state.gateway)


async def body_of(request: HttpRequest) -> bytes:
    """The raw body, within the operator's bounds. Raises `PhloemError` as `read_body` does."""
    config = gateway_of(request).config
    return await read_body(
        request.receive,
        request.headers.get("content-length"),
        max_bytes=config.max_body_bytes,
        timeout_s=config.body_timeout_s,
    )


def takes_body(body_type: type[msgspec.Struct]) -> type[Operation]:
    """An OpenAPI operation whose request body is `body_type`: handlers decode it themselves, so that every
    error has OpenAI's shape."""

    @dataclass
    class BodyOperation(Operation):
        def __post_init__(self) -> None:
            schema = _MsgspecSchema(body_type=body_type)
            self.request_body = RequestBody(
                content={"application/json": OpenAPIMediaType(schema=schema)}, required=True
            )

    return BodyOperation


@dataclass
class _MsgspecSchema(Schema):
    """A schema that msgspec wrote, for Litestar's page."""

    body_type: type[msgspec.Struct] = msgspec.Struct

    def to_schema(self) -> dict[str, Any]:  # Any: as Litestar declares it
        schema = msgspec.json.schema(self.body_type)
        return cast("dict[str, Any]", _inlined(schema, schema.pop("$defs", {})))


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:  # Any: a JSON schema
    """`schema` with each reference replaced by what it names: the page has no place for them. No body is
    recursive."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items()}

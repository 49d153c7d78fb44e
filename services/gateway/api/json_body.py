"""The body of a request: read within bounds, decoded into a typed struct, errors named by field."""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from litestar.types import Receive

from phloem.services.gateway.api.allowed_values import allowed_values
from phloem.shared.errors import PhloemError, invalid_request

Body = TypeVar("Body")

_LOCATION = re.compile(r"^(?P<problem>.*) - at `\$\.?(?P<path>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`$")


async def read_body(
    receive: Receive, content_length: str | None, *, max_bytes: int, timeout_s: float
) -> bytes:
    """The whole body. Raises `PhloemError`: 413 as soon as it is known to be over `max_bytes` (with or
    without a Content-Length), 408 when it takes longer than `timeout_s`, 499 when the client goes away."""
    if content_length is not None and content_length.isdecimal() and int(content_length) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(receive, max_bytes)
    except TimeoutError as error:
        raise PhloemError(
            "request_timeout", f"the body did not arrive within {timeout_s:g} s", http_status=408
        ) from error


async def _read(receive: Receive, max_bytes: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise PhloemError("client_gone", "the client went away", http_status=499)
        body += message.get("body", b"")  # type: ignore[arg-type]  # the union covers websockets too
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return bytes(body)


def decode_json(data: bytes | msgspec.Raw, body_type: Any) -> Any:
    """`data` as a `body_type` (Any: it may be any type expression), strictly: no text for a number.

    Nesting is bounded by the interpreter's recursion limit, also in fields that are ignored. Raises
    `PhloemError` (400): `invalid_json`, `missing_required_parameter`, `invalid_type` or `invalid_value`, with
    the field as a path like `messages[0].content`.
    """
    if not data:
        raise invalid_request("the body is empty: it has to be a JSON object", code="invalid_json")
    try:
        return msgspec.json.decode(data, type=body_type)
    except msgspec.ValidationError as error:
        raise _wrong_field(str(error), body_type) from error
    except RecursionError as error:
        raise invalid_request("the JSON body is nested too deeply", code="invalid_json") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid_request(f"the body is not valid JSON: {error}", code="invalid_json") from error


def _wrong_field(message: str, body_type: Any) -> PhloemError:
    located = _LOCATION.match(message)
    problem = located["problem"] if located else message
    path = located["path"] if located else ""
    missing = _MISSING.match(problem)
    if missing:
        path = f"{path}.{missing['field']}".lstrip(".")
        return invalid_request(
            f"missing required parameter: {path}", param=path, code="missing_required_parameter"
        )
    if problem.startswith("Invalid enum value") and (allowed := allowed_values(body_type, path)):
        problem += f": it must be one of {', '.join(allowed)}"
    wrong_type = problem.startswith("Expected") and " of length " not in problem
    code = "invalid_type" if wrong_type else "invalid_value"
    return invalid_request(f"{path or 'the body'}: {problem}", param=path or None, code=code)


def _too_large(max_bytes: int) -> PhloemError:
    return PhloemError("body_too_large", f"the body is over {max_bytes} bytes", http_status=413)

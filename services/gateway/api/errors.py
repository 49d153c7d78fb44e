"""Every error as OpenAI's `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import math
from typing import Any, TypeAlias

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException
from litestar.types import ExceptionHandlersMap
from msgspec import Struct

from phloem.services.gateway.api.access import log_fields_of
from phloem.shared.errors import ErrorInfo, PhloemError

log = logging.getLogger(__name__)

# Any: user, auth and state types that this app doesn't use.
HttpRequest: TypeAlias = Request[Any, Any, Any]

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}

INTERNAL_ERROR = ErrorInfo("internal_error", "an internal error occurred; the server's log has the details")


class ErrorDetail(Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Struct, frozen=True):
    error: ErrorDetail


def error_body(info: ErrorInfo) -> bytes:
    """The JSON of an error, for a response or a server-sent event."""
    default = "server_error" if info.http_status >= 500 else "invalid_request_error"
    kind = _TYPES.get(info.http_status, default)
    return msgspec.json.encode(ErrorBody(ErrorDetail(info.message, kind, info.param, info.code)))


def error_headers(info: ErrorInfo) -> dict[str, str]:
    """Retry-After where the error advises it; WWW-Authenticate with a 401."""
    headers = {}
    if info.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(info.retry_after_s)))
    if info.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def info_of(error: BaseException) -> ErrorInfo:
    """What the client may know of `error`; a bug of ours is logged and shows nothing of itself."""
    if isinstance(error, PhloemError):
        return error.info
    log.error("unexpected error", exc_info=error)
    return INTERNAL_ERROR


def exception_handlers() -> ExceptionHandlersMap:
    """Litestar's table: ours, the framework's own, and whatever is left."""
    return {PhloemError: _answer_error, HTTPException: _answer_http_exception, Exception: _answer_error}


def _answer_error(request: HttpRequest, error: Exception) -> Response[bytes]:
    return _response(request, info_of(error))


def _answer_http_exception(request: HttpRequest, error: HTTPException) -> Response[bytes]:
    status = error.status_code
    if status >= 500:
        return _response(request, info_of(error))
    message = error.detail
    if isinstance(error, NotFoundException):
        message = f"there is no route {request.method} {request.scope['path'][:256]}"
    elif isinstance(error, MethodNotAllowedException):
        message = f"{request.scope['path'][:256]} does not take {request.method}"
    info = ErrorInfo(_CODES.get(status, "bad_request"), message, http_status=status)
    return _response(request, info, error.headers or {})


def _response(
    request: HttpRequest, info: ErrorInfo, headers: dict[str, str] | None = None
) -> Response[bytes]:
    log_fields_of(request.scope)["error"] = info.code
    return Response(
        error_body(info),
        status_code=info.http_status,
        media_type="application/json",
        headers={**(headers or {}), **error_headers(info)},
    )

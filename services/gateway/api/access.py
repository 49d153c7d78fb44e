"""Around every request: its id, its log line, its metrics. Also around those that no route takes."""

from __future__ import annotations

import logging
import secrets
import time
from hashlib import blake2b

from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from phloem.services.gateway.call import Call
from phloem.services.gateway.metrics import GatewayMetrics
from phloem.services.gateway.tenant import Tenant
from phloem.shared.telemetry.logs import request_context

log = logging.getLogger(__name__)

# In the request's state.
CLIENT_GONE = "client_gone"
SERVER_SEND = "server_send"
_STATUS_CLIENT_GONE = 499
_NO_ROUTE = "(none)"
_QUIET_ROUTES = frozenset(("/health", "/metrics"))  # asked every few seconds by machines
_TIMELINE_HEADER = b"x-phloem-timeline"
_CLIENT_ID_HEADER = b"x-request-id"
_MOST_CLIENT_ID_BYTES = 128


class AccessLayer:
    """The outermost ASGI application: gives each request an id and reports its end."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics
        self._key = secrets.token_bytes(32)
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        request_id = self._new_id()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["received_at"] = time.monotonic()
        state[SERVER_SEND] = send
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        with request_context(request_id):
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                self._report(scope, _STATUS_CLIENT_GONE if state.get(CLIENT_GONE) else status)

    def _new_id(self) -> str:
        """Unique, and not to be guessed from another one; costs no system call."""
        self._num_requests += 1
        number = self._num_requests.to_bytes(8, "little")
        return "req-" + blake2b(number, key=self._key, digest_size=12).hexdigest()

    def _report(self, scope: Scope, status: int) -> None:
        route = str(scope.get("path_template") or _NO_ROUTE)
        self._metrics.request_answered(route, status)
        level = logging.DEBUG if route in _QUIET_ROUTES else logging.INFO
        if not log.isEnabledFor(level):
            return
        state = scope["state"]
        tenant: Tenant | None = state.get("tenant")
        log.log(
            level,
            "request",
            extra={
                "route": route,
                "method": scope.get("method"),
                "status": status,
                "seconds": round(time.monotonic() - state["received_at"], 6),
                **({"tenant": tenant.id} if tenant is not None and tenant.id else {}),
                **_client_id_of(scope),
                **log_fields_of(scope),
            },
        )


def _client_id_of(scope: Scope) -> dict[str, str]:
    """The client's own name for the request, to find it by; never trusted to be unique."""
    name = next((value for name, value in scope["headers"] if name == _CLIENT_ID_HEADER), b"")
    shown = name[:_MOST_CLIENT_ID_BYTES].decode("ascii", "backslashreplace")
    return {"client_request_id": shown} if shown else {}


def log_fields_of(scope: Scope) -> dict[str, object]:
    """What is known of the request for its log line; handlers add to it."""
    fields: dict[str, object] = scope["state"].setdefault("log_fields", {})
    return fields


def call_of(scope: Scope) -> Call:
    """The facts of the request, once the guard has run."""
    state = scope["state"]
    wanted = next((value for name, value in scope["headers"] if name == _TIMELINE_HEADER), b"")
    return Call(
        request_id=state["request_id"],
        tenant=state["tenant"],
        received_at=state["received_at"],
        created=int(time.time()),
        wants_timeline=wanted.strip() == b"1",
    )

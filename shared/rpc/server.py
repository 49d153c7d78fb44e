"""An asyncio gRPC server whose methods take and return msgspec structs."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio

from phloem.shared.errors import PhloemError
from phloem.shared.host_port import host_port
from phloem.shared.protocol.codec import MAX_MESSAGE_BYTES, Codec
from phloem.shared.rpc.auth import TOKEN_METADATA_KEY, service_token, token_matches
from phloem.shared.rpc.status import status_of, trailing_metadata

log = logging.getLogger(__name__)

Request = TypeVar("Request")
Response = TypeVar("Response")
# Any: grpc's stubs make the context generic over wire types, which are plain bytes here.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)


class RpcServer:
    """Serves methods until `stop`. Every call must carry the cluster's token.

    A handler raises `PhloemError` to answer a typed error; anything else is logged and answered as
    `internal_error` without details.
    """

    def __init__(self, cluster_secret: bytes) -> None:
        self._token = service_token(cluster_secret)
        self._server = grpc.aio.server(options=CHANNEL_OPTIONS)

    def add_unary(
        self,
        service: str,
        method: str,
        request: Codec[Request],
        response: Codec[Response],
        handler: Callable[[Request], Awaitable[Response]],
    ) -> None:
        """Serves a call with one request and one response, to peers that show the token. A `PhloemError` of
        the handler reaches the caller as it is; of anything else it learns no more than that."""

        async def call(data: bytes, context: Context) -> bytes:
            await self._authenticate(context)
            try:
                return response.encode(await handler(request.decode(data)))
            except PhloemError as error:
                await context.abort(status_of(error), str(error), trailing_metadata(error))
            except Exception:
                log.exception("unhandled error in %s/%s", service, method)
                await context.abort(grpc.StatusCode.INTERNAL, "internal error")
            raise AssertionError("abort raises")

        self._register(service, method, grpc.unary_unary_rpc_method_handler(call))

    def add_stream(
        self,
        service: str,
        method: str,
        down: Codec[Request],
        up: Codec[Response],
        handler: Callable[[AsyncIterator[Request]], AsyncIterator[Response]],
    ) -> None:
        """A bidirectional stream: `handler` takes the messages of the caller and yields the answers. The
        handler's iterator is closed when the caller goes away."""

        async def call(data: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
            await self._authenticate(context)

            async def decoded() -> AsyncIterator[Request]:
                async for item in data:
                    yield down.decode(item)

            try:
                async for message in handler(decoded()):
                    yield up.encode(message)
            except PhloemError as error:
                await context.abort(status_of(error), str(error), trailing_metadata(error))

        self._register(service, method, grpc.stream_stream_rpc_method_handler(call))

    async def start(self, host: str, port: int) -> int:
        """Binds and serves; returns the port (a free one when `port` is 0).

        Raises `PhloemError` (`port_in_use`) when the address can't be bound.
        """
        try:
            bound = self._server.add_insecure_port(host_port(host, port))
        except RuntimeError as error:
            raise PhloemError(
                "port_in_use",
                f"can't listen on {host_port(host, port)}: is another process using it? Choose another "
                "--port.",
            ) from error
        await self._server.start()
        return bound

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)

    # Any: grpc's handler type is generic over wire types.
    def _register(self, service: str, method: str, handler: Any) -> None:
        generic = grpc.method_handlers_generic_handler(service, {method: handler})
        self._server.add_generic_rpc_handlers((generic,))

    async def _authenticate(self, context: Context) -> None:
        for key, value in context.invocation_metadata() or ():
            if key == TOKEN_METADATA_KEY and token_matches(value, self._token):
                return
        error = PhloemError(
            "unauthenticated",
            "the cluster token is missing or wrong: give all services the same --cluster-secret",
            http_status=401,
        )
        await context.abort(status_of(error), str(error), trailing_metadata(error))

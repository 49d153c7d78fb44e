"""The calling side: one channel per peer process, typed unary calls and streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from phloem.shared.errors import unavailable
from phloem.shared.protocol.codec import Codec
from phloem.shared.rpc.auth import TOKEN_METADATA_KEY, service_token
from phloem.shared.rpc.server import CHANNEL_OPTIONS
from phloem.shared.rpc.status import error_from_call

Request = TypeVar("Request")
Response = TypeVar("Response")


class RpcStream(Generic[Request, Response]):
    """A bidirectional stream. One task writes, one iterates; `cancel` ends it at once."""

    # Any: grpc's call type is generic over wire types, which are plain bytes here.
    def __init__(self, call: Any, down: Codec[Request], up: Codec[Response], address: str) -> None:
        self._call = call
        self._down = down
        self._up = up
        self._address = address

    async def write(self, message: Request) -> None:
        """Raises `PhloemError` (retryable) when the stream is broken."""
        try:
            await self._call.write(self._down.encode(message))
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self._address) from error
        except grpc.aio.UsageError as error:
            raise unavailable(f"the stream to {self._address} is closed", code="peer_unavailable") from error

    async def __aiter__(self) -> AsyncIterator[Response]:
        """Yields until the peer ends the stream; raises `PhloemError` when it breaks."""
        try:
            async for data in self._call:
                yield self._up.decode(data)
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error, self._address) from error

    async def drive(self, *jobs: Coroutine[object, object, None]) -> None:
        """Runs what reads and writes this stream until the first of them ends; then the stream and the others
        are cancelled. Raises what it raised."""
        # Tasks of their own: a stream that is cancelled cancels whoever reads it.
        tasks = [asyncio.ensure_future(job) for job in jobs]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.result()
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def cancel(self) -> None:
        self._call.cancel()


class RpcChannel:
    """A lazily connected channel to "host:port"; `close` it when the peer is gone."""

    def __init__(self, address: str, cluster_secret: bytes) -> None:
        self.address = address
        self._metadata = ((TOKEN_METADATA_KEY, service_token(cluster_secret)),)
        options = (
            *CHANNEL_OPTIONS,
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            ("grpc.use_local_subchannel_pool", 1),
        )
        # Any: grpc's stubs ask for serializers that generic calls leave out.
        self._channel: Any = grpc.aio.insecure_channel(address, options=options)

    def unary(
        self, service: str, method: str, request: Codec[Request], response: Codec[Response]
    ) -> Callable[[Request, float], Awaitable[Response]]:
        """A function (message, deadline in seconds) -> answer, which raises `PhloemError`."""
        stub = self._channel.unary_unary(f"/{service}/{method}")

        async def call(message: Request, timeout_s: float) -> Response:
            try:
                data = await stub(request.encode(message), timeout=timeout_s, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                raise error_from_call(error, self.address) from error
            return response.decode(data)

        return call

    def stream(
        self, service: str, method: str, down: Codec[Request], up: Codec[Response]
    ) -> RpcStream[Request, Response]:
        """Opens a stream; it connects in the background and fails on first use when it can't."""
        call = self._channel.stream_stream(f"/{service}/{method}")(metadata=self._metadata)
        return RpcStream(call, down, up, self.address)

    async def close(self) -> None:
        await self._channel.close()

"""The RPC layer: typed messages, typed errors, and the cluster's token."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import pytest

from phloem.shared.errors import PhloemError
from phloem.shared.protocol.codec import Codec
from phloem.shared.rpc.client import RpcChannel
from phloem.shared.rpc.server import RpcServer


class Ping(msgspec.Struct, frozen=True):
    n: int


ping: Codec[Ping] = Codec(Ping)


async def double(message: Ping) -> Ping:
    if message.n < 0:
        raise PhloemError("negative", "n is negative", http_status=400, param="n")
    return Ping(message.n * 2)


async def double_each(messages: AsyncIterator[Ping]) -> AsyncIterator[Ping]:
    async for message in messages:
        yield await double(message)


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = RpcServer(b"secret")
    server.add_unary("test.Service", "Double", ping, ping, double)
    server.add_stream("test.Service", "DoubleEach", ping, ping, double_each)
    port = await server.start("127.0.0.1", 0)
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def test_unary_returns_the_typed_answer(address: str) -> None:
    channel = RpcChannel(address, b"secret")
    assert await channel.unary("test.Service", "Double", ping, ping)(Ping(4), 5.0) == Ping(8)
    await channel.close()


async def test_unary_raises_the_peers_typed_error(address: str) -> None:
    channel = RpcChannel(address, b"secret")
    with pytest.raises(PhloemError) as caught:
        await channel.unary("test.Service", "Double", ping, ping)(Ping(-1), 5.0)
    assert (caught.value.code, caught.value.info.param, caught.value.info.http_status) == (
        "negative",
        "n",
        400,
    )
    await channel.close()


async def test_call_without_the_clusters_secret_is_refused(address: str) -> None:
    channel = RpcChannel(address, b"another secret")
    with pytest.raises(PhloemError) as caught:
        await channel.unary("test.Service", "Double", ping, ping)(Ping(1), 5.0)
    assert caught.value.code == "unauthenticated"
    await channel.close()


async def test_stream_carries_messages_both_ways_and_ends_with_the_typed_error(address: str) -> None:
    channel = RpcChannel(address, b"secret")
    stream = channel.stream("test.Service", "DoubleEach", ping, ping)
    answers = aiter(stream.__aiter__())
    for n in range(3):
        await stream.write(Ping(n))
        assert await anext(answers) == Ping(2 * n)
    await stream.write(Ping(-1))
    with pytest.raises(PhloemError) as caught:
        await anext(answers)
    assert caught.value.code == "negative"
    await channel.close()


async def test_unreachable_peer_is_a_retryable_error() -> None:
    channel = RpcChannel("127.0.0.1:1", b"secret")
    with pytest.raises(PhloemError) as caught:
        await channel.unary("test.Service", "Double", ping, ping)(Ping(1), 2.0)
    assert caught.value.retryable
    await channel.close()

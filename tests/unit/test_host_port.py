"""Addresses together and apart, over IPv4 and IPv6; servers and channels on ::1."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phloem.shared.errors import PhloemError
from phloem.shared.host_port import family_of, host_port, split_host_port
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.worker_rpc import WORKER_SERVICE, Done, DrainRequest, done, drain_request
from phloem.shared.rpc.client import RpcChannel
from phloem.shared.rpc.server import RpcServer
from phloem.shared.telemetry.metrics import MetricsServer, new_registry
from phloem.shared.transfer.events import ChannelOpened, PieceReceived
from phloem.shared.transfer.pending import MovedNow
from tests.support.transfer import DECODE, PREFILL, Recorded, piece, transfer_config

IPV6 = "::1"


@pytest.mark.parametrize(
    ("host", "written"),
    [("127.0.0.1", "127.0.0.1:80"), ("::1", "[::1]:80"), ("[::1]", "[::1]:80"), ("gpu-3", "gpu-3:80")],
)
def test_ipv6_addresses_are_written_in_brackets(host: str, written: str) -> None:
    assert host_port(host, 80) == written
    assert split_host_port(written) == (host.strip("[]"), 80)


@given(
    st.one_of(st.ip_addresses().map(str), st.from_regex(r"[a-z][a-z0-9.-]{0,20}", fullmatch=True)),
    st.integers(1, 65535),
)
def test_what_is_put_together_comes_apart(host: str, port: int) -> None:
    assert split_host_port(host_port(host, port)) == (host, port)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "nowhere",
        "host:",
        "host:port",
        "host:0",
        "host:65536",
        ":80",
        "::1:80",
        "[]:80",
        "[host]:80",
        "[::1]",
        "::1",
    ],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(PhloemError, match="is not host:port") as caught:
        split_host_port(address)
    assert caught.value.code == "bad_address"


def test_family_follows_the_address() -> None:
    assert family_of("127.0.0.1").name == "AF_INET"
    assert family_of(IPV6).name == "AF_INET6"


def test_channel_opens_and_moves_bytes_over_ipv6() -> None:
    def on_ipv6(me: PeerRef, *, accepts: bool) -> Recorded:
        return Recorded(msgspec.structs.replace(transfer_config(me, accepts=accepts), host=IPV6))

    decode, prefill = on_ipv6(DECODE, accepts=True), on_ipv6(PREFILL, accepts=False)
    try:
        assert decode.endpoint.address.startswith("[::1]:")
        prefill.endpoint.peer_up(DECODE, decode.endpoint.address)
        prefill.next(ChannelOpened)
        decode.next(ChannelOpened)
        slot = prefill.endpoint.acquire_slot(DECODE)
        assert slot is not None
        slot.tensor.fill_(7)
        prefill.endpoint.send_piece(DECODE, piece("r"), slot, MovedNow(0))
        received = decode.next(PieceReceived)
        assert int(received.data.sum()) == 7 * received.header.num_bytes
        decode.endpoint.release(received)
    finally:
        prefill.endpoint.close(0.0)
        decode.endpoint.close(0.0)


async def test_calls_and_metrics_are_served_over_ipv6() -> None:
    server = RpcServer(b"secret")

    async def drained(request: DrainRequest) -> Done:
        assert request.epoch == 3
        return Done()

    server.add_unary(WORKER_SERVICE, "Drain", drain_request, done, drained)
    port = await server.start(IPV6, 0)
    channel = RpcChannel(host_port(IPV6, port), b"secret")
    metrics = await MetricsServer.start(new_registry("test"), IPV6, 0)
    try:
        assert (
            await channel.unary(WORKER_SERVICE, "Drain", drain_request, done)(DrainRequest(3), 5.0) == Done()
        )
        with pytest.raises(PhloemError, match=r"\[::1\]"):
            await MetricsServer.start(new_registry("other"), IPV6, metrics.port)
    finally:
        await channel.close()
        await metrics.close()
        await server.stop(0.0)

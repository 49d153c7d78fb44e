"""What a gateway asks for before others than this machine can reach it."""

from __future__ import annotations

import logging

import pytest

from phloem.services.gateway.config import GatewayConfig
from phloem.services.gateway.main import is_loopback, refuse_anonymous, run
from phloem.shared.errors import ConfigError
from phloem.shared.host_port import host_port


@pytest.mark.parametrize(
    ("address", "only_here"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.5", False),
        ("fe80::1%eth0", False),
    ],
)
def test_only_loopback_addresses_are_out_of_reach_of_others(address: str, only_here: bool) -> None:
    assert is_loopback(address) is only_here


async def test_a_gateway_that_others_can_reach_does_not_start_without_a_key() -> None:
    with pytest.raises(ConfigError) as caught:
        await run(GatewayConfig(host="0.0.0.0", port=0))
    assert caught.value.info.param == "api_key"
    for remedy in ("--api-key", "PHLOEM_API_KEY", "--allow-anonymous"):
        assert remedy in str(caught.value)


def test_an_admin_key_is_no_api_key() -> None:
    with pytest.raises(ConfigError):
        refuse_anonymous(GatewayConfig(admin_api_key="root"), on_loopback=False)


def test_it_starts_with_a_key_on_loopback_or_when_told_to(caplog: pytest.LogCaptureFixture) -> None:
    refuse_anonymous(GatewayConfig(api_key=("key",)), on_loopback=False)
    refuse_anonymous(GatewayConfig(), on_loopback=True)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        refuse_anonymous(GatewayConfig(allow_anonymous=True), on_loopback=False)
    assert "--allow-anonymous" in caplog.text


@pytest.mark.parametrize(
    ("keys", "asked", "limit"),
    [
        ((), 0, 9),  # whoever comes is one tenant: all is its own
        (("a",), 0, 9),
        (("a", "b"), 0, 5),
        (("a", "b", "c"), 0, 5),
        (("a", "b"), 9, 9),
        (("a",), 2, 2),
    ],
)
def test_one_of_several_keys_has_half_of_all_places(keys: tuple[str, ...], asked: int, limit: int) -> None:
    config = GatewayConfig(api_key=keys, max_inflight_requests=9, max_inflight_per_key=asked)
    assert config.inflight_limit_per_key == limit


@pytest.mark.parametrize(
    ("host", "written"),
    [("127.0.0.1", "127.0.0.1:80"), ("::1", "[::1]:80"), ("localhost", "localhost:80")],
)
def test_an_ipv6_address_is_written_in_brackets(host: str, written: str) -> None:
    assert host_port(host, 80) == written

"""Filling configuration structs: precedence, hints, ranges, and the address to bind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from msgspec import Meta, Struct

from phloem.shared.config.bind_host import interface_addresses, resolve_host
from phloem.shared.config.fields import config_fields
from phloem.shared.config.loader import load_config
from phloem.shared.errors import ConfigError

SECTIONS = ("gateway", "prefill", "cache-index", "up")


class Inner(Struct, frozen=True, kw_only=True):
    page_size: Annotated[int, Meta(ge=1, le=64, description="tokens per page")] = 16
    share: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.85
    policy: Literal["fcfs", "lpm"] = "fcfs"


class Outer(Struct, frozen=True, kw_only=True):
    redis_url: str
    port: Annotated[int, Meta(ge=0, le=65535, description="where it listens")] = 30000
    inner: Inner = Inner()
    quiet: bool = False
    names: tuple[str, ...] = ()
    api_key: Annotated[str, Meta(min_length=8)] | None = None
    cluster_secret: bytes = b""

    def __post_init__(self) -> None:
        if self.port == 1:
            raise ValueError("--port 1 is reserved")


def load(
    flags: dict[str, object] | None = None, *, toml: Path | None = None, environ: dict[str, str] | None = None
) -> Outer:
    return load_config(
        Outer,
        section="gateway",
        toml_path=toml,
        environ=environ,
        overrides={"redis_url": "redis://r", **(flags or {})},
        sections=SECTIONS,
        foreign_variables=("MODEL_PATH",),
    )


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "phloem.toml"
    path.write_text(text)
    return path


def test_each_source_overrides_the_one_before(tmp_path: Path) -> None:
    toml = write(tmp_path, "[gateway]\nport = 1000\npage-size = 2\nquiet = true\nshare = 0.5\n[up]\nx = 1\n")
    config = load({"port": "3000"}, toml=toml, environ={"PHLOEM_PORT": "2000", "PHLOEM_PAGE_SIZE": "4"})
    assert config == Outer(redis_url="redis://r", port=3000, quiet=True, inner=Inner(page_size=4, share=0.5))


def test_variable_that_names_the_service_wins_over_the_general_one() -> None:
    environ = {"PHLOEM_GATEWAY_PORT": "4", "PHLOEM_PORT": "2", "PHLOEM_UP_PORT": "3"}
    assert load(environ=environ).port == 4


def test_variables_of_other_services_are_theirs() -> None:
    environ = {"PHLOEM_CACHE_INDEX_PORT": "5", "PHLOEM_MODEL_PATH": "x", "HOME": "/"}
    assert load(environ=environ) == Outer(redis_url="redis://r")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"quiet": "true"}, Outer(redis_url="redis://r", quiet=True)),
        ({"quiet": False}, Outer(redis_url="redis://r")),
        ({"names": "a, b"}, Outer(redis_url="redis://r", names=("a", "b"))),
        ({"cluster_secret": "söß"}, Outer(redis_url="redis://r", cluster_secret="söß".encode())),
        ({"port": None}, Outer(redis_url="redis://r")),
    ],
)
def test_text_becomes_the_fields_type(flags: dict[str, object], expected: Outer) -> None:
    assert load(flags) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"page_size": "100"}, "--page-size: '100' is not valid: expected an integer from 1 to 64."),
        ({"page_size": "x"}, "--page-size: 'x' is not valid: expected an integer from 1 to 64."),
        ({"share": "1.5"}, "--share: '1.5' is not valid: expected a number more than 0.0 and less than 1.0."),
        (
            {"policy": "fcf"},
            "--policy: 'fcf' is not valid: expected one of fcfs, lpm. Did you mean fcfs?",
        ),
        ({"quiet": "yes"}, "--quiet: 'yes' is not valid: expected true or false."),
        ({"api_key": "abc"}, "--api-key: (hidden) is not valid: expected text at least 8 characters."),
        ({"port": "1"}, "--port 1 is reserved"),
        (
            {"redis_url": None},
            "--redis-url is required (or PHLOEM_REDIS_URL, or redis-url in [gateway] of phloem.toml).",
        ),
        ({"pagesize": "3"}, "unknown flag --pagesize. Did you mean --page-size?"),
    ],
)
def test_wrong_flag_is_refused_with_flag_value_and_range(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(flags)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"PHLOEM_PAGE_SIZE": "0"},
            "PHLOEM_PAGE_SIZE (--page-size): '0' is not valid: expected an integer from 1 to 64.",
        ),
        ({"PHLOEM_PORTT": "0"}, "unknown environment variable PHLOEM_PORTT. Did you mean PHLOEM_PORT?"),
        (
            {"PHLOEM_GATEWAY_PAGESIZE": "0"},
            "unknown environment variable PHLOEM_GATEWAY_PAGESIZE. Did you mean PHLOEM_GATEWAY_PAGE_SIZE?",
        ),
    ],
)
def test_wrong_variable_is_refused_with_a_hint(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ=environ)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[gateway]\npagesize = 3\n", "unknown key pagesize in [gateway]. Did you mean page-size?"),
        ("[gatewy]\n", "unknown table [gatewy]. Did you mean [gateway]?"),
        ("gateway = 3\n", "gateway must be a table: [gateway]"),
        ("[gateway\n", "is not valid TOML"),
        (
            '[gateway]\nport = "30000"\n',
            "[gateway] port (--port): '30000' is not valid: expected an integer from 0 to 65,535.",
        ),
    ],
)
def test_wrong_file_is_refused_with_its_name(tmp_path: Path, toml: str, message: str) -> None:
    path = write(tmp_path, toml)
    with pytest.raises(ConfigError) as caught:
        load(toml=path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"can't read the configuration file /no/such.toml"):
        load(toml=Path("/no/such.toml"))


def test_fields_are_flattened_and_described() -> None:
    fields = {field.flag: field for field in config_fields(Outer)}
    assert list(fields) == [
        "--redis-url", "--port", "--page-size", "--share", "--policy", "--quiet", "--names", "--api-key",
        "--cluster-secret",
    ]  # fmt: skip
    assert fields["--page-size"].path == ("inner", "page_size")
    assert (fields["--page-size"].metavar, fields["--page-size"].description) == ("INT", "tokens per page")
    assert fields["--policy"].choices == ("fcfs", "lpm")
    assert fields["--redis-url"].required
    assert fields["--quiet"].is_bool


INTERFACES = {"lo": "127.0.0.1", "eth0": "172.18.0.3"}


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("auto-private", "172.18.0.3"), ("if:lo", "127.0.0.1")],
)
def test_host_names_an_address_or_where_to_find_it(host: str, address: str) -> None:
    assert resolve_host(host, INTERFACES) == address


@pytest.mark.parametrize(
    ("host", "addresses", "message"),
    [
        ("auto-private", {"lo": "127.0.0.1"}, "no private address"),
        ("auto-private", {"eth0": "8.8.8.8"}, "no private address"),
        ("auto-private", {**INTERFACES, "eth1": "10.0.0.1"}, "more than one private address"),
        ("if:eth9", INTERFACES, "no such interface"),
    ],
)
def test_host_that_is_not_clear_is_refused(host: str, addresses: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_host(host, addresses)


def test_loopback_is_among_this_machines_interfaces() -> None:
    assert interface_addresses()["lo"] == "127.0.0.1"

"""The configuration structs of all services hold what the loader and the help need."""

from __future__ import annotations

import pytest

from phloem.cli.flags import load_from_all, struct_command
from phloem.cli.serve import log_options, with_bound_host
from phloem.cli.services import SERVICES, ServiceSpec, all_sections
from phloem.cli.up.config import UpConfig
from phloem.shared.config.fields import config_fields
from phloem.shared.telemetry.logs import LogOptions

BY_NAME = pytest.mark.parametrize("spec", SERVICES, ids=[spec.name for spec in SERVICES])


@BY_NAME
def test_every_flag_of_a_service_is_described_and_has_a_default(spec: ServiceSpec) -> None:
    fields = config_fields(spec.load_struct())
    assert {"--host", "--redis-url", "--cluster-secret", "--log-level"} <= {field.flag for field in fields}
    assert not [field.flag for field in fields if not field.description or field.required]


def test_every_flag_of_up_is_described_and_has_a_default() -> None:
    fields = config_fields(UpConfig)
    assert {"--prefill", "--decode", "--page-size", "--model-path"} <= {field.flag for field in fields}
    assert not [field.flag for field in fields if not field.description or field.required]


@BY_NAME
def test_defaults_load_and_name_loopback(spec: ServiceSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PHLOEM_REDIS_URL", "PHLOEM_CONFIG"):
        monkeypatch.delenv(variable, raising=False)
    struct = spec.load_struct()
    config = load_from_all(struct, spec.name, None, {})
    assert config == struct()
    assert getattr(with_bound_host(config), "host") == "127.0.0.1"  # noqa: B009  (each struct has its own type)
    assert log_options(config) == LogOptions()


@BY_NAME
def test_command_of_a_service_has_its_flags(spec: ServiceSpec) -> None:
    command = struct_command(spec.load_struct(), spec.name, spec.summary, lambda config, path: 0)
    assert command() == 0
    assert command.__doc__ == spec.summary


def test_sections_of_the_file_are_the_services_and_up() -> None:
    assert all_sections() == ("gateway", "prefill", "decode", "unified", "cache-index", "up")

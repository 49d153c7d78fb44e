"""What `phloem up` is going to start, and with which flags, before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from phloem.cli.up.config import UpConfig
from phloem.cli.up.devices import count_gpus
from phloem.cli.up.own_settings import sections_that_set
from phloem.cli.up.plan import ChildSpec, Surroundings, placed_options, plan_services, served_model_name
from phloem.shared.engine.config import EngineOptions

AROUND = Surroundings("redis://:pw@127.0.0.1:1/0", "s3cret", Path("/models/m"), None, {"HOME": "/root"})


def plan(config: UpConfig, around: Surroundings = AROUND) -> dict[str, ChildSpec]:
    return {spec.name: spec for spec in plan_services(config, around)}


def flag(spec: ChildSpec, name: str) -> str:
    return spec.argv[spec.argv.index(name) + 1]


def test_plan_has_a_process_for_each_count() -> None:
    specs = plan(UpConfig(prefill=2, decode=1, unified=1, gateways=2, port=31000))
    assert list(specs) == [
        "cache-index", "prefill-0", "prefill-1", "decode-0", "unified-0", "gateway-0", "gateway-1",
    ]  # fmt: skip
    assert [specs[f"gateway-{i}"].port for i in range(2)] == [31000, 31001]
    assert specs["prefill-1"].argv[1:5] == ("-m", "phloem.cli.main", "serve", "prefill")


def test_secrets_are_in_the_environment_and_not_on_the_command_line() -> None:
    for spec in plan(UpConfig()).values():
        assert spec.env["PHLOEM_CLUSTER_SECRET"] == "s3cret"
        assert spec.env["PHLOEM_REDIS_URL"].startswith("redis://:pw@")
        assert not any("s3cret" in word or "pw" in word for word in spec.argv)


def test_engine_flags_reach_workers_when_they_differ_from_the_default() -> None:
    options = EngineOptions(chunked_prefill_size=16, disable_radix_cache=True, max_total_tokens=4096)
    specs = plan(UpConfig(engine=options))
    worker = specs["prefill-0"]
    assert (flag(worker, "--chunked-prefill-size"), flag(worker, "--max-total-tokens")) == ("16", "4096")
    assert "--disable-radix-cache" in worker.argv
    assert "--page-size" not in worker.argv
    assert "--chunked-prefill-size" not in specs["gateway-0"].argv


@pytest.mark.parametrize(
    ("prefill", "decode", "unified", "peers"),
    [
        (1, 1, 0, {}),
        (8, 8, 0, {}),
        (1, 9, 0, {"prefill-0": "9"}),
        (2, 4, 1, {"unified-0": "6"}),
        (1, 1, 1, {}),
        (0, 0, 12, {}),
    ],
)
def test_workers_have_channels_with_all_their_peers(
    prefill: int, decode: int, unified: int, peers: dict[str, str]
) -> None:
    specs = plan(UpConfig(prefill=prefill, decode=decode, unified=unified))
    given = {
        name: flag(spec, "--transfer-peers")
        for name, spec in specs.items()
        if "--transfer-peers" in spec.argv
    }
    assert given == peers


def test_peers_that_the_user_set_stay() -> None:
    specs = plan(UpConfig(prefill=1, decode=9, engine=EngineOptions(transfer_peers=3)))
    assert flag(specs["prefill-0"], "--transfer-peers") == "3"
    around = AROUND._replace(own_peers=frozenset({"prefill"}))
    assert "--transfer-peers" not in plan(UpConfig(prefill=1, decode=9), around)["prefill-0"].argv


def test_settings_of_one_kind_of_workers_are_found(tmp_path: Path) -> None:
    path = tmp_path / "phloem.toml"
    path.write_text("[up]\ntransfer-peers = 9\n[decode]\ntransfer-peers = 4\n[prefill]\npage_size = 16\n")
    environ = {"PHLOEM_UNIFIED_TRANSFER_PEERS": "1", "PHLOEM_TRANSFER_PEERS": "2"}
    found = sections_that_set("transfer_peers", ("prefill", "decode", "unified"), path, environ)
    assert found == {"decode", "unified"}
    assert not sections_that_set("transfer_peers", ("prefill", "decode"), None, environ)


def test_general_variables_are_not_passed_on_but_those_of_a_service_are() -> None:
    environ = {"PHLOEM_PORT": "1", "PHLOEM_UP_PREFILL": "2", "PHLOEM_GATEWAY_API_KEY": "k", "HOME": "/h"}
    env = plan(UpConfig(), AROUND._replace(environ=environ))["gateway-0"].env
    assert {"PHLOEM_GATEWAY_API_KEY", "HOME"} <= set(env)
    assert not {"PHLOEM_PORT", "PHLOEM_UP_PREFILL"} & set(env)


def test_shared_redis_gets_names_of_this_run() -> None:
    specs = plan(UpConfig(), AROUND._replace(name_suffix="-ab12"))
    assert flag(specs["prefill-0"], "--worker-id") == "prefill-0-ab12"
    assert flag(specs["cache-index"], "--service-id") == "cache-index-ab12"


@pytest.mark.parametrize(
    ("device", "num_workers", "num_gpus", "places"),
    [
        ("auto", 2, 0, [("auto", 0.0), ("auto", 0.0)]),
        ("auto", 2, 2, [("auto", 0.0), ("auto", 0.0)]),
        ("auto", 3, 2, [("cuda:0", 0.425), ("cuda:1", 0.425), ("cuda:0", 0.425)]),
        ("cpu", 2, 1, [("cpu", 0.0), ("cpu", 0.0)]),
    ],
)
def test_workers_that_share_a_gpu_share_its_memory(
    device: str, num_workers: int, num_gpus: int, places: list[tuple[str, float]]
) -> None:
    options = EngineOptions(device=device)
    placed = [placed_options(options, rank, num_workers, num_gpus) for rank in range(num_workers)]
    assert [(p.device, p.mem_fraction_static) for p in placed] == places


@pytest.mark.parametrize("share", [0.5, 0.85])
def test_memory_that_the_user_set_stays(share: float) -> None:
    options = EngineOptions(mem_fraction_static=share)
    assert placed_options(options, 0, 4, 1).mem_fraction_static == share


def test_served_name_is_what_the_user_calls_the_model(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    assert served_model_name(str(tmp_path / "my-model")) == "my-model"
    assert served_model_name("owner/name") == "owner/name"


@pytest.mark.parametrize(
    "config", [dict(prefill=0), dict(decode=0), dict(prefill=0, decode=0), dict(port=65535, gateways=2)]
)
def test_impossible_clusters_are_refused(config: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="--"):
        UpConfig(**config)  # type: ignore[arg-type]


def test_gpus_are_counted_from_device_files_or_the_variable(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert count_gpus({}, tmp_path) == 2
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "3"}, tmp_path) == 1
    assert count_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0

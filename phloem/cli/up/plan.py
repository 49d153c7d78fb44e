"""Which processes a cluster is made of: pure, from the flags."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from phloem.cli.up.config import UpConfig
from phloem.shared.config.fields import config_fields
from phloem.shared.config.sources import ENV_PREFIX, env_word
from phloem.shared.engine.config import GPU_MEM_FRACTION, EngineOptions
from phloem.shared.errors import ConfigError
from phloem.shared.protocol.cluster import Role
from phloem.shared.transfer.config import default_peers
from phloem.shared.worker.peers import roles_that_pair

Kind: TypeAlias = Literal["valkey", "cache-index", "prefill", "decode", "unified", "gateway"]

# First to stop comes first: nothing new comes in, then what is under way ends, then what all of them use.
STOP_ORDER: tuple[tuple[Kind, ...], ...] = (
    ("gateway",),
    ("prefill", "decode", "unified"),
    ("cache-index",),
    ("valkey",),
)
WORKER_KINDS: tuple[Kind, ...] = ("prefill", "decode", "unified")


class ChildSpec(NamedTuple):
    """A process to run. `name` is unique; `port` is None where the process chooses its own."""

    kind: Kind
    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    port: int | None = None


class Surroundings(NamedTuple):
    """What is known once the preparations are done.

    `name_suffix` keeps the names of this cluster's processes apart from others' in a shared Redis.
    `own_peers`: the kinds of workers for which an operator has set `--transfer-peers` elsewhere.
    """

    redis_url: str
    cluster_secret: str
    model_dir: Path
    config_path: Path | None
    environ: Mapping[str, str]
    num_gpus: int = 0
    name_suffix: str = ""
    own_peers: frozenset[str] = frozenset()


def plan_services(config: UpConfig, around: Surroundings) -> list[ChildSpec]:
    """All processes but Valkey. Secrets travel in the environment, where other users can't read them."""
    env = child_environment(around)
    common = ["--host", config.host, "--log-level", config.log_level, "--log-format", "text"]
    if around.config_path is not None:
        common += ["--config", str(around.config_path.resolve())]
    return [
        _plan_index(around, common, env),
        *_plan_workers(config, around, common, env),
        *_plan_gateways(config, around, common, env),
    ]


def _plan_index(around: Surroundings, common: list[str], env: dict[str, str]) -> ChildSpec:
    name = "cache-index"
    flags = [*common, "--service-id", name + around.name_suffix]
    return ChildSpec("cache-index", name, _serve("cache-index", flags), env)


def _plan_workers(
    config: UpConfig, around: Surroundings, common: list[str], env: dict[str, str]
) -> Iterator[ChildSpec]:
    counts: tuple[tuple[Role, int], ...] = (
        ("prefill", config.prefill),
        ("decode", config.decode),
        ("unified", config.unified),
    )
    names = [(kind, f"{kind}-{index}") for kind, count in counts for index in range(count)]
    for rank, (kind, name) in enumerate(names):
        options = placed_options(config.engine, rank, len(names), around.num_gpus)
        if not options.transfer_peers and kind not in around.own_peers:
            options = msgspec.structs.replace(options, transfer_peers=_more_peers(kind, dict(counts)))
        engine = engine_flags(options, str(around.model_dir))
        argv = _serve(kind, [*common, "--worker-id", name + around.name_suffix, *engine])
        yield ChildSpec(kind, name, argv, env)


def _more_peers(kind: Role, counts: Mapping[Role, int]) -> int:
    """As many peers as a worker of this cluster has; 0: its default will do."""
    num_peers = sum(counts[other] for other in roles_that_pair(kind))
    return num_peers if num_peers > default_peers(kind) else 0


def _plan_gateways(
    config: UpConfig, around: Surroundings, common: list[str], env: dict[str, str]
) -> Iterator[ChildSpec]:
    for index, port in enumerate(config.gateway_ports):
        name = f"gateway-{index}"
        flags = [*common, "--port", str(port), "--gateway-id", name + around.name_suffix]
        flags += ["--model-path", str(around.model_dir)]
        flags += ["--served-model-name", served_model_name(config.engine.model_path)]
        yield ChildSpec("gateway", name, _serve("gateway", flags), env, port)


def served_model_name(model_path: str) -> str:
    """What requests call the model: a path's last part, or the name or hub id as it was given."""
    return Path(model_path).name if Path(model_path).expanduser().exists() else model_path


def require_gpu_each(config: UpConfig, num_gpus: int) -> None:
    """Raises `ConfigError` when workers that hand KV over would share a GPU: NCCL joins no two processes on
    one. Unified workers may share, they hand nothing over to each other."""
    num_workers = config.prefill + config.decode + config.unified
    device = config.engine.device
    apart = device == "cpu" or num_gpus == 0 or (device in ("auto", "cuda") and num_workers <= num_gpus)
    if apart or not (config.prefill or config.decode):
        return
    has = f"this host has {num_gpus} GPU{'s' if num_gpus > 1 else ''}"
    where = has if device in ("auto", "cuda") else f"--device {device} names one for all"
    raise ConfigError(
        f"{num_workers} workers want a GPU each, and {where}: KV can't be handed over within a GPU. Use "
        f"--prefill 0 --decode 0 --unified {max(1, num_gpus)}, where each worker does both, or --device cpu",
        param="prefill",
    )


def placed_options(options: EngineOptions, rank: int, num_workers: int, num_gpus: int) -> EngineOptions:
    """The options of worker `rank`. Where there is a GPU for each worker, each claims its own; where there
    are fewer, they are handed out in turn, and those that share one share its memory. What the user has set
    stays."""
    if num_gpus == 0 or num_workers <= num_gpus or options.device not in ("auto", "cuda"):
        return options
    share = options.mem_fraction_static or round(GPU_MEM_FRACTION / -(-num_workers // num_gpus), 4)
    return msgspec.structs.replace(options, device=f"cuda:{rank % num_gpus}", mem_fraction_static=share)


def engine_flags(options: EngineOptions, model_dir: str) -> list[str]:
    """The flags that differ from their defaults; defaults are left to each worker's own sources."""
    flags = ["--model-path", model_dir]
    for field in msgspec.structs.fields(EngineOptions):
        value = getattr(options, field.name)
        if field.name == "model_path" or value == field.default:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def child_environment(around: Surroundings) -> dict[str, str]:
    """This environment without the general `PHLOEM_*` variables, which `up` has read for itself already."""
    read = {ENV_PREFIX + env_word(field.name) for field in config_fields(UpConfig)}
    read.add(f"{ENV_PREFIX}CONFIG")
    env = {
        name: value
        for name, value in around.environ.items()
        if name not in read and not name.startswith(f"{ENV_PREFIX}UP_")
    }
    env[f"{ENV_PREFIX}REDIS_URL"] = around.redis_url
    env[f"{ENV_PREFIX}CLUSTER_SECRET"] = around.cluster_secret
    return env


def _serve(kind: Kind, flags: list[str]) -> tuple[str, ...]:
    return (sys.executable, "-m", "phloem.cli.main", "serve", kind, *flags)

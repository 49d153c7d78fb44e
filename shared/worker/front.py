"""A worker's front, from its flags to a worker that serves.

1. Redis, the cluster's secret, an epoch, the model directory, a GPU of its own. 2. The engine loads;
progress is logged. 3. It serves (`ServingWorker`) until SIGTERM, Drain, or the death of the engine. A signal
before 3 ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from phloem.shared.discovery.registry import Registry
from phloem.shared.discovery.secret import cluster_secret
from phloem.shared.engine.config import EngineConfig, EngineOptions
from phloem.shared.model_store.resolve import default_cache_dir, resolve_model
from phloem.shared.protocol.cluster import Role
from phloem.shared.protocol.session import PeerRef
from phloem.shared.telemetry.logs import LogOptions
from phloem.shared.worker.accelerator import claimed_gpu, host_gpus
from phloem.shared.worker.config import WorkerConfig
from phloem.shared.worker.engine_env import engine_environment
from phloem.shared.worker.engine_process import ENGINE_COMMAND, EngineProcess
from phloem.shared.worker.engine_start import wait_until_ready
from phloem.shared.worker.progress_log import ProgressLog
from phloem.shared.worker.serving import ServingWorker

log = logging.getLogger(__name__)


async def run_worker(
    config: WorkerConfig,
    role: Role,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
) -> None:
    """Runs a worker until it has drained.

    Raises `PhloemError` when it can't start or loses its engine; all that it started has ended then.
    """
    async with AsyncExitStack() as stack:
        registry = Registry(config.redis_url)
        stack.push_async_callback(registry.close)
        await registry.connect(config.redis_wait_s)
        secret = await cluster_secret(registry, config.cluster_secret)
        me = PeerRef(config.worker_id or _random_id(role), await registry.next_epoch())
        model_dir = await asyncio.to_thread(_model_dir, config.engine)
        gpu = await stack.enter_async_context(
            claimed_gpu(registry, host_gpus(os.environ), config.engine.device, me)
        )
        env = engine_environment(config.engine.num_threads, {**os.environ, **gpu})
        engine = await EngineProcess.start(
            engine_command, _engine_config(config, role, me, secret, model_dir), env
        )
        log.info("engine started", extra={"worker": me.worker_id, "engine_pid": engine.pid})
        stack.push_async_callback(engine.kill)
        ready = await wait_until_ready(engine, config.engine_start_timeout_s)
        await ServingWorker(config, role, me, secret, registry, engine, ready).run()


def _engine_config(
    config: WorkerConfig, role: Role, me: PeerRef, secret: bytes, model_dir: Path
) -> EngineConfig:
    return EngineConfig(
        worker_id=me.worker_id,
        epoch=me.epoch,
        role=role,
        host=config.host,
        cluster_secret=secret,
        options=msgspec.structs.replace(config.engine, model_path=str(model_dir)),
        hang_timeout_s=config.engine_hang_timeout_s,
        logs=LogOptions(log_level=config.log_level, log_format=config.log_format),
    )


def _model_dir(options: EngineOptions) -> Path:
    return resolve_model(
        options.model_path,
        cache_dir=default_cache_dir(),
        progress=ProgressLog(),
        need_weights=options.load_format != "dummy",
    )


def _random_id(role: Role) -> str:
    return f"{role}-{secrets.token_hex(4)}"

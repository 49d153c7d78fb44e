"""`phloem up`: prepare, start, wait, show, answer, then supervise until told to stop.

1. The ports are free? 2. Valkey, unless --redis-url; the cluster's secret is agreed on there, so that more
services can join later. 3. The model is fetched and converted once. 4. The index, workers and gateways start
together. 5. A table, the URL, a curl line and a real answer. 6. Children that die or hang are started
again. 7. A signal stops gateways, workers, the index, Valkey; a second one kills.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from phloem.cli.flags import struct_command
from phloem.cli.services import UP_SECTION
from phloem.cli.up.child_log import Stage
from phloem.cli.up.config import UpConfig
from phloem.cli.up.devices import count_gpus
from phloem.cli.up.display import Display, display_for
from phloem.cli.up.first_answer import first_answer
from phloem.cli.up.hang_watch import kill_what_hangs
from phloem.cli.up.model import prepare_model
from phloem.cli.up.own_settings import sections_that_set
from phloem.cli.up.plan import (
    WORKER_KINDS,
    ChildSpec,
    Surroundings,
    plan_services,
    require_gpu_each,
    served_model_name,
)
from phloem.cli.up.ports import free_port, require_free_port
from phloem.cli.up.readiness import gateway_url, wait_until_ready
from phloem.cli.up.secret import keep_secret
from phloem.cli.up.summary import curl_line, print_answer, service_table
from phloem.cli.up.supervisor import Supervisor
from phloem.cli.up.valkey import plan_valkey, wait_for_redis
from phloem.shared.config.bind_host import resolve_host
from phloem.shared.discovery.registry import Registry
from phloem.shared.discovery.secret import cluster_secret
from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.errors import ConfigError, PhloemError
from phloem.shared.lifecycle.service import run_service, stop_event
from phloem.shared.telemetry.logs import LogOptions

_ANSWER_TIMEOUT_S = 120.0
_REDIS_WAIT_S = 30.0
_API_KEY_VARIABLE = "PHLOEM_GATEWAY_API_KEY"


def _run_up(config: UpConfig, config_path: Path | None) -> int:
    up_run = UpRun(config, config_path, Console(highlight=False))
    return run_service(up_run.run, service="up", logs=LogOptions(log_level="error"))


up = struct_command(
    UpConfig, UP_SECTION, "Start a whole cluster on this machine; Ctrl-C stops it in order.", _run_up
)


class UpRun:
    """One run of `phloem up`."""

    def __init__(self, config: UpConfig, config_path: Path | None, console: Console) -> None:
        self._config = config
        self._config_path = config_path
        self._console = console
        self._host = resolve_host(config.host)
        self._redis_url = config.redis_url
        self._secret = b""
        self._specs: list[ChildSpec] = []

    async def run(self) -> None:
        """Ends on a signal, or after the answer with `--once`. Raises `PhloemError` if it can't start."""
        require_gpu_each(self._config, count_gpus(os.environ))
        for port in self._config.gateway_ports:
            require_free_port(self._host, port, "--port")
        stop = stop_event()
        run_dir = _make_run_dir(self._config.run_dir)
        async with Supervisor(run_dir, self._line, self._config.stop_timeout_s) as supervisor:
            serving = self._until_served(supervisor)
            if await _first_of(serving, supervisor.failure(), stop.wait()) and not self._config.once:
                self._line("Ctrl-C stops the cluster.")
                await self._until_stopped(supervisor, stop)
            self._line("Stopping ...")
        if not self._config.run_dir and not any(c.num_restarts for c in supervisor.children.values()):
            shutil.rmtree(run_dir, ignore_errors=True)
        self._line("Stopped.")

    async def _until_served(self, supervisor: Supervisor) -> None:
        """From nothing to a cluster that has answered."""
        async with asyncio.timeout(self._config.start_timeout_s), AsyncExitStack() as stack:
            with display_for(self._console) as display:
                await self._redis(supervisor, display)
                registry = Registry(self._redis_url)
                stack.push_async_callback(registry.close)
                self._secret = await cluster_secret(registry, self._config.cluster_secret)
                model_dir = await self._model(display)
                specs = self._plan(model_dir)
                for spec in specs:
                    await supervisor.start(spec)
                    display.stage(spec.name, Stage("starting", 0, 0))
                snapshot = await wait_until_ready(supervisor, specs, registry, self._host, display)
        supervisor.settle()
        self._specs = specs
        await self._show(supervisor, specs, snapshot)

    async def _until_stopped(self, supervisor: Supervisor, stop: asyncio.Event) -> None:
        registry = Registry(self._redis_url)
        beside: list[Coroutine[Any, Any, None]] = []  # which never end
        if not self._config.cluster_secret:
            beside.append(keep_secret(self._redis_url, self._secret))
        if self._config.hang_timeout_s:
            beside.append(kill_what_hangs(supervisor, self._specs, registry, self._config.hang_timeout_s))
        try:
            await _first_of(_wait(stop), *beside)
        finally:
            await registry.close()

    async def _redis(self, supervisor: Supervisor, display: Display) -> None:
        """Waits for a Redis that answers: the user's, or a Valkey of our own."""
        if self._config.redis_url:
            registry = Registry(self._config.redis_url)
            try:
                await registry.connect(
                    _REDIS_WAIT_S, lambda _: display.stage("redis", Stage("waiting for Redis", 0, 0))
                )
            finally:
                await registry.close()
            display.ready("redis")
            return
        display.stage("valkey", Stage("starting", 0, 0))
        valkey = plan_valkey(supervisor.run_dir, self._host, free_port(self._host))
        await supervisor.start(valkey.spec)
        await wait_for_redis(valkey.url)
        display.ready("valkey")
        self._redis_url = valkey.url

    async def _model(self, display: Display) -> Path:
        options = self._config.engine
        display.stage("model", Stage(f"looking for {options.model_path}", 0, 0))
        path = await prepare_model(
            options.model_path,
            need_weights=options.load_format != "dummy",
            on_stage=lambda stage: display.stage("model", stage),
        )
        display.ready("model", path.name)
        return path

    def _plan(self, model_dir: Path) -> list[ChildSpec]:
        around = Surroundings(
            redis_url=self._redis_url,
            cluster_secret=self._secret.decode(),
            model_dir=model_dir,
            config_path=self._config_path,
            environ=os.environ,
            num_gpus=count_gpus(os.environ),
            name_suffix=f"-{secrets.token_hex(2)}" if self._config.redis_url else "",
            own_peers=sections_that_set("transfer_peers", WORKER_KINDS, self._config_path, os.environ),
        )
        return plan_services(self._config, around)

    async def _show(self, supervisor: Supervisor, specs: list[ChildSpec], snapshot: ClusterSnapshot) -> None:
        """The table, the URL, a curl line, and the answer."""
        gateways = [spec for spec in specs if spec.kind == "gateway"]
        urls = [gateway_url(self._host, spec) for spec in gateways]
        model = served_model_name(self._config.engine.model_path)
        api_key = os.environ.get(_API_KEY_VARIABLE, "").split(",")[0]
        self._console.print()
        self._console.print(service_table(list(supervisor.children.values()), snapshot))
        self._line(f"\nLogs: {supervisor.run_dir}\n\nPhloem serves {model} at {', '.join(urls)}. Try:\n")
        self._line(f"  {curl_line(urls[0], model, needs_key=bool(api_key))}\n")
        if self._config.ask:
            answer = await first_answer(urls[0], model, api_key, _ANSWER_TIMEOUT_S)
            print_answer(self._console, answer)
            self._line("")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


async def _wait(stop: asyncio.Event) -> None:
    await stop.wait()


# Any: the results of the other coroutines don't matter.
async def _first_of(work: Coroutine[Any, Any, None], *others: Coroutine[Any, Any, Any]) -> bool:
    """Runs all until one ends, and cancels the rest; whether it was `work`. Raises what that one raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in (work, *others)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        try:
            task.result()
        except TimeoutError as error:
            raise PhloemError(
                "start_timeout", "the cluster was not ready in time: raise --start-timeout-s, or see the logs"
            ) from error
    return tasks[0] in done


def _make_run_dir(named: str) -> Path:
    """A folder that only this user can read: it holds logs and Valkey's password."""
    if not named:
        return Path(tempfile.mkdtemp(prefix="phloem-up-"))
    path = Path(named).expanduser().resolve()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--run-dir {named}: {error.strerror}", param="run_dir") from error
    return path

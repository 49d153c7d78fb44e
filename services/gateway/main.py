"""A gateway, from its flags to an HTTP server that answers until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from contextlib import AsyncExitStack
from ipaddress import ip_address

from phloem.services.gateway.app import create_app
from phloem.services.gateway.cluster.client import ClusterClient
from phloem.services.gateway.config import GatewayConfig
from phloem.services.gateway.gateway import Gateway
from phloem.services.gateway.http_server import bind, serve_http
from phloem.services.gateway.metrics import GatewayMetrics
from phloem.services.gateway.served_model import ServedModel, served_name
from phloem.services.gateway.text.loading import load_prompt_encoder
from phloem.services.gateway.text.prompt_encoder import PromptEncoder
from phloem.shared.discovery.lease import LeaseKeeper, ServiceLease
from phloem.shared.discovery.registry import Registry
from phloem.shared.discovery.secret import cluster_secret
from phloem.shared.errors import ConfigError
from phloem.shared.host_port import host_port
from phloem.shared.lifecycle.service import stop_event
from phloem.shared.model_store.model_config import load_model_config
from phloem.shared.model_store.resolve import default_cache_dir, resolve_model
from phloem.shared.protocol.cluster import ServiceRecord

log = logging.getLogger(__name__)


async def run(config: GatewayConfig) -> None:
    """Serves until SIGTERM, then drains. Raises `PhloemError` when it can't start."""
    # Prompts are encoded one by one on our own threads; the library's pool would only cost memory.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    async with AsyncExitStack() as stack:
        listener = bind(config.host, config.port)
        stack.callback(listener.close)
        on_loopback = is_loopback(listener.getsockname()[0])
        refuse_anonymous(config, on_loopback=on_loopback)
        model, encoder = await asyncio.to_thread(load_model, config)
        stack.callback(encoder.close)

        registry = Registry(config.redis_url)
        stack.push_async_callback(registry.close)
        await registry.connect(config.redis_wait_s)
        secret = await cluster_secret(registry, config.cluster_secret)
        gateway_id = config.gateway_id or f"gateway-{secrets.token_hex(4)}"
        metrics = GatewayMetrics()
        client = await stack.enter_async_context(
            ClusterClient(registry, secret, gateway_id, metrics.registry, config.cluster)
        )
        gateway = Gateway(config, client, encoder, model, metrics)

        keeper = await _register(config, registry, gateway_id, listener.getsockname()[1])
        stack.push_async_callback(keeper.close)
        app = create_app(gateway, secret, on_loopback=on_loopback)
        stop = stop_event()  # not before: until here a signal just ends the process
        async with asyncio.TaskGroup() as tasks:
            heartbeat = tasks.create_task(keeper.run(), name="registration")
            await serve_http(app, listener, stop, drain_timeout_s=config.drain_timeout_s)
            heartbeat.cancel()


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches what listens on the IP address `address`."""
    return ip_address(address.partition("%")[0]).is_loopback


def refuse_anonymous(config: GatewayConfig, *, on_loopback: bool) -> None:
    """Raises `ConfigError` when others than this machine could use the gateway without a key and nobody has
    said that they may."""
    if on_loopback or config.api_key:
        return
    if not config.allow_anonymous:
        raise ConfigError(
            f"--host {config.host} can be reached from other machines, and there is no --api-key: give one "
            "(PHLOEM_API_KEY), or say --allow-anonymous (PHLOEM_ALLOW_ANONYMOUS=true) to serve all who come.",
            param="api_key",
        )
    log.warning("--allow-anonymous: whoever reaches %s can use the models", config.host)


async def _register(config: GatewayConfig, registry: Registry, gateway_id: str, port: int) -> LeaseKeeper:
    """The held lease of this gateway; its owner runs and closes it."""
    record = ServiceRecord(
        kind="gateway",
        service_id=gateway_id,
        epoch=await registry.next_epoch(),
        address=host_port(config.advertise_host or config.host, port),
    )
    keeper = LeaseKeeper(ServiceLease(registry, record))
    await keeper.acquire()
    log.info("serving", extra={"address": record.address})
    return keeper


def load_model(config: GatewayConfig) -> tuple[ServedModel, PromptEncoder]:
    """Reads what the gateway needs of the model; blocks. Raises `PhloemError` naming the file at fault."""
    model_dir = resolve_model(config.model_path, cache_dir=default_cache_dir(), need_weights=False)
    model_config = load_model_config(model_dir)
    encoder = load_prompt_encoder(
        model_dir,
        chat_template=config.chat_template,
        template_timeout_s=config.chat_template_timeout_s,
        num_threads=config.tokenizer_threads,
    )
    model = ServedModel(
        name=served_name(config.served_model_name, config.model_path),
        path=config.model_path,
        context_length=model_config.context_length,
        vocab_size=model_config.vocab_size,
        created=int(time.time()),
    )
    return model, encoder

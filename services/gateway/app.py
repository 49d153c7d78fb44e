"""The ASGI application."""

from __future__ import annotations

from litestar import Litestar
from litestar.datastructures import State
from litestar.openapi import OpenAPIConfig
from litestar.types import ASGIApp

import phloem
from phloem.services.gateway.api.access import AccessLayer
from phloem.services.gateway.api.auth import Authenticator
from phloem.services.gateway.api.debug_routes import get_request
from phloem.services.gateway.api.errors import exception_handlers
from phloem.services.gateway.api.health_routes import health, health_generate, metrics
from phloem.services.gateway.api.native_routes import flush_cache, generate, get_model_info
from phloem.services.gateway.api.openai_routes import chat_completions, completions, get_model, list_models
from phloem.services.gateway.api.route_header import RouteHeaderLayer
from phloem.services.gateway.api.schema_page import SchemaPage
from phloem.services.gateway.gateway import Gateway


def create_app(gateway: Gateway, cluster_secret: bytes, *, on_loopback: bool) -> ASGIApp:
    """All routes over `gateway`. `cluster_secret` keys the tenants' cache salts; `on_loopback` says whether
    only this machine can reach them.

    The OpenAPI page is at /schema, behind the same keys as the rest."""
    config = gateway.config
    authenticator = Authenticator(
        config.api_key,
        config.admin_api_key,
        cluster_secret,
        on_loopback=on_loopback,
        allow_anonymous=config.allow_anonymous,
    )
    app = Litestar(
        [
            chat_completions,
            completions,
            list_models,
            get_model,
            generate,
            get_model_info,
            flush_cache,
            health,
            health_generate,
            metrics,
            get_request,
        ],
        guards=[authenticator.guard],
        exception_handlers=exception_handlers(),
        state=State({"gateway": gateway}),
        openapi_config=OpenAPIConfig(
            title="Phloem", version=phloem.__version__, render_plugins=[SchemaPage()]
        ),
        # Bodies are read by the handlers, who bound them; logs are set up by the process.
        request_max_body_size=None,
        logging_config=None,
    )
    explained = RouteHeaderLayer(app, lambda request_id: gateway.generator.route_report(request_id))
    return AccessLayer(explained, gateway.metrics)

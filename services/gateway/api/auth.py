"""Bearer keys. Decided by the handler that the route led to, so no spelling of a path gets around it; a
handler is closed unless it says otherwise."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers.base import BaseRouteHandler

from phloem.services.gateway.api.origin import foreign_header
from phloem.services.gateway.api.route_header import asks_why
from phloem.services.gateway.tenant import Tenant, tenant_of_key
from phloem.shared.errors import PhloemError

PUBLIC = {"access": "public"}  # liveness only
ADMIN = {"access": "admin"}


class Authenticator:
    """Knows the keys as digests. Without API keys all routes are open but the admin's. Those, and requests
    that want to be explained, take only the admin key as soon as there is any key, or others than this
    machine can ask; without an admin key they are shut then.

    What is open because only this machine reaches it is still shut to the web pages that a browser here has
    open, unless `allow_anonymous`, and the admin's routes even then."""

    def __init__(
        self,
        api_keys: Sequence[str],
        admin_key: str,
        cluster_secret: bytes,
        *,
        on_loopback: bool,
        allow_anonymous: bool = False,
    ) -> None:
        self._tenants = {_digest(key): tenant_of_key(key, cluster_secret) for key in api_keys}
        self._admin = _digest(admin_key) if admin_key else None
        self._admin_tenant = tenant_of_key(admin_key, cluster_secret) if admin_key else Tenant()
        self._admin_is_open = on_loopback and not api_keys and not admin_key
        self._refuses_pages = on_loopback and not allow_anonymous

    # Any: user, auth and state types of Litestar that this app doesn't use.
    async def guard(self, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        """Litestar's guard for every route: leaves the tenant in the state. Raises 401 or 403.

        Waits for nothing; but Litestar calls guards that are plain functions on a thread."""
        access = handler.opt.get("access")
        if access == "public":
            return
        shown = _bearer(connection.headers.get("authorization"))
        explain = asks_why(connection.scope["headers"])  # it tells of workers and of others' load
        page = foreign_header(connection.headers.get("origin"), connection.headers.get("host"))
        is_admins = access == "admin" or explain
        tenant = self._admin_only(shown, page) if is_admins else self._any_key(shown, page)
        connection.scope["state"]["tenant"] = tenant

    def _any_key(self, shown: str | None, page: str | None) -> Tenant:
        """`page`: the header that names a web page from elsewhere."""
        if not self._tenants:
            if page is not None and self._refuses_pages:
                raise _foreign_page(page, "--api-key, or --allow-anonymous")
            return Tenant()
        tenant = self._find(shown)
        if tenant is None:
            raise _unauthorized()
        return tenant

    def _admin_only(self, shown: str | None, page: str | None) -> Tenant:
        if self._admin_is_open:
            if page is not None:
                raise _foreign_page(page, "--admin-api-key")
            return Tenant()
        tenant = self._find(shown)
        if tenant is None and (self._tenants or self._admin is not None):
            raise _unauthorized()
        if tenant is None or tenant is not self._admin_tenant:
            message = "this route, or a header of the request, needs the gateway's --admin-api-key"
            raise PhloemError("admin_key_required", message, http_status=403)
        return tenant

    def _find(self, shown: str | None) -> Tenant | None:
        """Compares with every key, so that the time tells nothing."""
        digest = _digest(shown or "")
        found = None
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        if self._admin is not None and hmac.compare_digest(self._admin, digest):
            found = self._admin_tenant
        return found if shown else None


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def _bearer(header: str | None) -> str | None:
    scheme, _, key = (header or "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def _unauthorized() -> PhloemError:
    return PhloemError(
        "invalid_api_key",
        "Missing or wrong API key: send it as 'Authorization: Bearer KEY'.",
        http_status=401,
    )


def _foreign_page(header: str, remedy: str) -> PhloemError:
    return PhloemError(
        "foreign_origin",
        f"The request's {header} header names a web page from elsewhere, and this gateway asks for no key as "
        f"it serves its own machine only: start it with {remedy} to let such pages in.",
        http_status=403,
    )

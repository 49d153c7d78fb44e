"""What an operator may ask about single requests."""

from __future__ import annotations

from litestar import get

from phloem.services.gateway.api.auth import ADMIN
from phloem.services.gateway.api.errors import HttpRequest
from phloem.services.gateway.api.operations import gateway_of
from phloem.services.gateway.route_report import RouteReport
from phloem.shared.errors import PhloemError


@get(
    "/debug/requests/{request_id:str}",
    opt=ADMIN,
    summary="Where one of the last requests went, and why",
)
async def get_request(request: HttpRequest) -> RouteReport:
    """Of a request that had several sequences, the second is `ID-1`, the third `ID-2`, ..."""
    request_id = str(request.path_params["request_id"])
    report = gateway_of(request).generator.route_report(request_id)
    if report is None:
        raise PhloemError(
            "request_not_found",
            f"no request {request_id[:128]!r} is known here: it was never routed, or it is too long ago, or "
            "another gateway had it",
            http_status=404,
            param="request_id",
        )
    return report

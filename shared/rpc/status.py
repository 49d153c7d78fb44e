"""`PhloemError` <-> gRPC status: the code for anyone, the whole `ErrorInfo` in the trailing metadata."""

from __future__ import annotations

from typing import Any

import grpc
import msgspec

from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.codec import Codec

ERROR_METADATA_KEY = "phloem-error-bin"

_error_info: Codec[ErrorInfo] = Codec(ErrorInfo, max_bytes=65536)

_STATUS_BY_HTTP = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def status_of(error: PhloemError) -> grpc.StatusCode:
    return _STATUS_BY_HTTP.get(error.info.http_status, grpc.StatusCode.INTERNAL)


def trailing_metadata(error: PhloemError) -> tuple[tuple[str, bytes], ...]:
    return ((ERROR_METADATA_KEY, _error_info.encode(error.info)),)


def error_from_call(error: grpc.aio.AioRpcError, peer: str) -> PhloemError:
    """The typed error that a failed call to `peer` ("host:port") stands for."""
    # Any: grpc's stubs do not say that metadata iterates over pairs.
    metadata: Any = error.trailing_metadata() or ()
    for key, value in metadata:
        if key == ERROR_METADATA_KEY and isinstance(value, bytes):
            try:
                return PhloemError.from_info(_error_info.decode(value))
            except (PhloemError, msgspec.MsgspecError):
                break
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return PhloemError(
            "deadline_exceeded", f"{peer} did not answer in time", retryable=True, http_status=504
        )
    return PhloemError(
        "peer_unavailable",
        f"call to {peer} failed: {error.code().name}: {error.details()}",
        retryable=True,
        http_status=503,
        retry_after_s=1.0,
    )

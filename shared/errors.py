"""The typed errors that cross service boundaries.

Input and peers raise a `PhloemError`; an `assert` is for our own bugs only. One handler maps it to HTTP
(OpenAI's error shape), one interceptor maps it to a gRPC status and back, so that `code` and `retryable`
mean the same on both sides of a wire.
"""

from __future__ import annotations

import msgspec


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error as it travels between processes.

    `code` is a stable snake_case word for programs, `message` a sentence for people that names the remedy,
    `param` the request field at fault, `retryable` says whether the same request may succeed elsewhere or
    later, `http_status` what the edge answers, `retry_after_s` what it advises.
    """

    code: str
    message: str
    retryable: bool = False
    http_status: int = 500
    param: str | None = None
    retry_after_s: float | None = None


class PhloemError(Exception):
    """Raised for everything that a caller, an operator or a peer can cause."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retryable: bool = False,
        http_status: int = 500,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.info = ErrorInfo(code, message, retryable, http_status, param, retry_after_s)

    @staticmethod
    def from_info(info: ErrorInfo) -> PhloemError:
        """The error that a peer sent, to be raised here; a `ConfigError` stays one."""
        if info.code == ConfigError.CODE:
            return ConfigError(info.message, param=info.param)
        return PhloemError(
            info.code,
            info.message,
            retryable=info.retryable,
            http_status=info.http_status,
            param=info.param,
            retry_after_s=info.retry_after_s,
        )

    @property
    def code(self) -> str:
        return self.info.code

    @property
    def retryable(self) -> bool:
        return self.info.retryable


def invalid_request(message: str, *, param: str | None = None, code: str = "invalid_value") -> PhloemError:
    """The client's request is wrong: HTTP 400, never retried."""
    return PhloemError(code, message, http_status=400, param=param)


def overloaded(message: str, *, code: str = "overloaded", retry_after_s: float = 1.0) -> PhloemError:
    """A bounded queue is full: HTTP 503 with Retry-After."""
    return PhloemError(code, message, retryable=True, http_status=503, retry_after_s=retry_after_s)


def unavailable(message: str, *, code: str = "unavailable", retry_after_s: float = 1.0) -> PhloemError:
    """A peer or pool that the request needs is not there now: HTTP 503 with Retry-After."""
    return PhloemError(code, message, retryable=True, http_status=503, retry_after_s=retry_after_s)


class ConfigError(PhloemError):
    """A flag, file or environment variable is wrong; the process prints `message` and exits with 2."""

    CODE = "invalid_config"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(self.CODE, message, http_status=500, param=param)

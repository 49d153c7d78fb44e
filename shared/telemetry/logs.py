"""Structured logs on stderr: one line per record, as key=value or JSON.

Fields come from `extra={...}` of the standard logging calls; the request id of the current task, set with
`request_context`, is in every record that it causes.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
LogFormat: TypeAlias = Literal["text", "json"]

_request_id: ContextVar[str | None] = ContextVar("phloem_request_id", default=None)
# What every LogRecord has; anything else on it came through `extra`.
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PLAIN_VALUE = re.compile(r"[^\x00-\x20\x7f\s\"=]+")  # no control characters: a terminal obeys them


class LogOptions(Struct, frozen=True, kw_only=True):
    """The logging flags of every service."""

    log_level: Annotated[LogLevel, Meta(description="least severity that is logged")] = "info"
    log_format: Annotated[LogFormat, Meta(description="text: key=value, or json")] = "text"


@contextmanager
def request_context(request_id: str) -> Iterator[None]:
    """Puts `request_id` into every record that the current task logs inside the block."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def setup_logging(service: str, options: LogOptions) -> None:
    """Sends the process's logs, and the warnings module's, to stderr. Replaces what was set up before."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service) if options.log_format == "json" else TextFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(options.log_level.upper())
    logging.captureWarnings(True)


def record_fields(record: logging.LogRecord) -> dict[str, object]:
    """The request id, if there is one, and what the call gave as `extra`."""
    fields: dict[str, object] = {}
    request_id = getattr(record, "request_id", None) or _request_id.get()
    if request_id is not None:
        fields["request_id"] = request_id
    fields.update((k, v) for k, v in vars(record).items() if k not in _STANDARD_FIELDS and k != "request_id")
    return fields


class TextFormatter(logging.Formatter):
    """`2026-11-21T21:40:01.123Z info gateway: message key=value ... (logger)`; a traceback follows below."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={_quoted(value)}" for key, value in record_fields(record).items())
        message = record.getMessage().replace("\n", "\\n")
        head = f"{_timestamp(record)} {record.levelname.lower()} {self._service}: {message}{fields}"
        line = f"{head} logger={record.name}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object per record, the traceback in `exception`."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **record_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry, enc_hook=str).decode()


def _timestamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def _quoted(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _PLAIN_VALUE.fullmatch(text) else msgspec.json.encode(text).decode()

"""One request before the run: does the target answer, which model is it, what does it understand?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from phloem.shared.bench.client.connection import Connection, ConnectionBroken, Inbox
from phloem.shared.bench.client.lag import LagMeter
from phloem.shared.bench.client.pool import ConnectionPool, Endpoint
from phloem.shared.bench.client.requester import Ask, Requester
from phloem.shared.bench.protocol import TargetSpec
from phloem.shared.bench.record import RequestRecord
from phloem.shared.bench.session import Session
from phloem.shared.errors import PhloemError

_TIMEOUT_S = 120.0
_PROBE_TOKENS = 4
_REFUSED = (400, 422)


class Probed(msgspec.Struct, frozen=True):
    """The target with its model and without what it refused, and what it said of itself."""

    spec: TargetSpec
    server: dict[str, Any]  # Any: whatever JSON the server describes its model with
    refused: tuple[str, ...]
    has_usage: bool
    has_chunk_counts: bool


async def probe(spec: TargetSpec, example: Session) -> Probed:
    """Asks for a few tokens of `example`'s kind. Raises `PhloemError` (`probe_failed`) with the target's own
    words when that is refused, also without the optional members of the request."""
    server = await _describe(spec)
    spec = spec if spec.model else msgspec.structs.replace(spec, model=_model_of(server))
    record = None
    for refused, reduced in _reductions(spec):
        record = await _ask(reduced, example)
        if record.succeeded:
            has_counts = bool(record.chunk_tokens)
            return Probed(reduced, server, refused, record.output_tokens >= 0, has_counts)
        if record.status not in _REFUSED:
            break
    assert record is not None
    raise PhloemError("probe_failed", f"{spec.name} ({spec.url}): {record.error}{_hint(record, example)}")


async def flush_cache(spec: TargetSpec) -> None:
    """POST /flush_cache. Raises `PhloemError` when the target has no such route or refuses."""
    status, body = await _call(spec, "POST", "/flush_cache")
    if status != 200:
        detail = body[:200].decode(errors="replace")
        raise PhloemError("flush_failed", f"{spec.name}: /flush_cache answered HTTP {status} {detail}")


def _reductions(spec: TargetSpec) -> Iterator[tuple[tuple[str, ...], TargetSpec]]:
    """The request as it should be, then with less and less of what a strict server may not know."""
    yield (), spec
    changes = (("continuous_usage_stats", "ask_chunk_usage"), ("ignore_eos", "ignore_eos"))
    refused: tuple[str, ...] = ()
    for name, field in (*changes, ("stream_options", "ask_usage")):
        if getattr(spec, field):
            refused = (*refused, name)
            spec = msgspec.structs.replace(spec, **{field: False})
            yield refused, spec


async def _ask(spec: TargetSpec, example: Session) -> RequestRecord:
    requester = Requester(0, spec, Inbox(LagMeter()), timeout_s=_TIMEOUT_S, keep_pieces=False)
    try:
        ask = Ask(example.kind, [example.turns[0].added], _PROBE_TOKENS, 0.0)
        return (await requester.ask(ask)).record
    finally:
        requester.close()


def _hint(record: RequestRecord, example: Session) -> str:
    if record.status in _REFUSED and example.kind == "tokens":
        return ". If it takes no token ids: --prompt-as text"
    return ""


async def _describe(spec: TargetSpec) -> dict[str, Any]:
    """What /v1/models and, for /generate, /get_model_info say; {} when they don't."""
    described: dict[str, Any] = {}
    paths = ["/v1/models"] if spec.api != "generate" else ["/v1/models", "/get_model_info"]
    for path in paths:
        status, body = await _call(spec, "GET", path)
        try:
            value = msgspec.json.decode(body) if status == 200 else None
        except msgspec.DecodeError:
            value = None
        if isinstance(value, dict):
            described[path] = value
    return described


def _model_of(server: dict[str, Any]) -> str:
    """The first model served; "" when the server doesn't tell (then it isn't named in requests)."""
    listed = server.get("/v1/models", {}).get("data")
    if isinstance(listed, list) and listed and isinstance(listed[0], dict):
        return str(listed[0].get("id", ""))
    return ""


async def _call(spec: TargetSpec, method: str, path: str) -> tuple[int, bytes]:
    """A plain HTTP call. Raises `PhloemError` (`unreachable`) when there is no answer."""
    endpoint = Endpoint(spec.url)
    lines = [
        f"{method} {endpoint.path.removesuffix('/v1')}{path} HTTP/1.1",
        f"host: {endpoint.authority}",
        "content-length: 0",
        *(f"{name}: {value}" for name, value in spec.headers),
    ]
    sink = _Collected()
    pool = ConnectionPool(endpoint, Inbox(LagMeter()))
    connection: Connection | None = None
    try:
        connection = await pool.open()
        status = await connection.exchange(("\r\n".join(lines) + "\r\n\r\n").encode(), sink)
    except (OSError, ConnectionBroken) as error:
        raise PhloemError("unreachable", f"no answer from {spec.url}: {error}", retryable=True) from error
    finally:
        if connection is not None:
            connection.close()
    return status, sink.data or connection.error_body


class _Collected:
    def __init__(self) -> None:
        self.data = b""

    def body(self, data: bytes, at_s: float) -> None:
        self.data += data

"""Log lines and the metrics server."""

from __future__ import annotations

import asyncio
import json
import logging
import sys

import pytest
from prometheus_client import CollectorRegistry, Counter

from phloem.shared.errors import PhloemError
from phloem.shared.telemetry.logs import JsonFormatter, TextFormatter, request_context
from phloem.shared.telemetry.metrics import MetricsServer, new_registry


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    logger = logging.getLogger("phloem.test")
    return logger.makeRecord("phloem.test", logging.WARNING, "f.py", 1, message, args, None, extra=extra)


def test_text_line_holds_message_fields_and_logger() -> None:
    line = TextFormatter("gateway").format(record("sent %d", 3, pages=12, peer="a b", rate=1 / 3))
    stamp, _, rest = line.partition(" ")
    assert stamp.endswith("Z")
    assert rest == 'warning gateway: sent 3 pages=12 peer="a b" rate=0.333333 logger=phloem.test'


def test_message_of_several_lines_stays_one_record() -> None:
    assert "a\\nforged" in TextFormatter("gateway").format(record("a\nforged"))


def test_control_characters_of_a_value_are_escaped() -> None:
    line = TextFormatter("gateway").format(record("x", peer="\x1b[2Jgone"))
    assert "peer=" in line
    assert "\x1b" not in line


def test_request_id_of_the_task_is_in_every_record() -> None:
    with request_context("req-1"):
        assert "request_id=req-1" in TextFormatter("g").format(record("x"))
    assert "request_id" not in TextFormatter("g").format(record("x"))


def test_json_line_is_one_object_with_the_exception() -> None:
    entry = record("failed", request_id="r", count=2)
    try:
        raise ValueError("inner")
    except ValueError:
        entry.exc_info = sys.exc_info()
    decoded = json.loads(JsonFormatter("index").format(entry))
    assert "ValueError: inner" in decoded.pop("exception")
    decoded.pop("time")
    assert decoded == {
        "level": "warning",
        "service": "index",
        "logger": "phloem.test",
        "message": "failed",
        "request_id": "r",
        "count": 2,
    }


async def ask(port: int, head: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode())
    answer = await asyncio.wait_for(reader.read(), 5.0)
    writer.close()
    await writer.wait_closed()
    return answer.decode()


async def test_metrics_server_answers_metrics_and_health() -> None:
    registry = new_registry("test")
    Counter("requests", "Requests.", registry=registry).inc(3)
    healthy = True
    server = await MetricsServer.start(registry, "127.0.0.1", 0, healthy=lambda: healthy)
    page = await ask(server.port, "GET /metrics?name=x HTTP/1.1\r\nhost: h\r\n\r\n")
    assert page.startswith("HTTP/1.1 200 OK\r\n")
    assert "requests_total 3.0" in page
    assert 'phloem_build_info{service="test",version=' in page
    assert (await ask(server.port, "GET /health HTTP/1.1\r\n\r\n")).startswith("HTTP/1.1 200")
    healthy = False
    assert (await ask(server.port, "GET /health HTTP/1.1\r\n\r\n")).startswith("HTTP/1.1 503")
    assert (await ask(server.port, "GET /etc HTTP/1.1\r\n\r\n")).startswith("HTTP/1.1 404")
    assert (await ask(server.port, "POST /metrics HTTP/1.1\r\n\r\n")).startswith("HTTP/1.1 405")
    await server.close()


async def test_oversized_head_is_dropped() -> None:
    server = await MetricsServer.start(CollectorRegistry(), "127.0.0.1", 0)
    assert await ask(server.port, "GET /metrics HTTP/1.1\r\nx: " + "a" * 10_000) == ""
    await server.close()


async def test_taken_port_is_a_typed_error_that_names_the_flag() -> None:
    server = await MetricsServer.start(CollectorRegistry(), "127.0.0.1", 0)
    with pytest.raises(PhloemError, match="--metrics-port") as caught:
        await MetricsServer.start(CollectorRegistry(), "127.0.0.1", server.port)
    assert caught.value.code == "port_in_use"
    await server.close()

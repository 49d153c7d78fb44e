"""A gateway with low limits, and its errors as tests compare them."""

from __future__ import annotations

from pathlib import Path

import httpx

from phloem.services.gateway.config import GatewayConfig
from phloem.services.gateway.gateway import Gateway
from tests.support.gateway import END, FakeGenerator, make_gateway, reply_script

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
INVALID = "invalid_request_error"
USER = [{"role": "user", "content": "hello"}]


def bounded_gateway(model_dir: Path) -> Gateway:
    """Takes 16 KiB, 8 messages, 4 prompts and n = 4 at most; its generator says nothing but the end."""
    config = GatewayConfig(max_body_bytes=16_384, max_messages=8, max_batch_prompts=4, max_n=4)
    return make_gateway(model_dir, FakeGenerator(reply_script([END])), config)


def error_of(response: httpx.Response) -> tuple[int, str, str | None, str]:
    """Status, type, param and code; the error has OpenAI's shape and a message."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return response.status_code, error["type"], error["param"], error["code"]

"""Where a request of a real cluster went and why, as a client and an operator can ask."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any, NamedTuple

import pytest

from tests.support.cluster import MODEL_NAME, Cluster

PROMPT = "Once upon a time there was a river that ran from the mountains to the sea. " * 12


class Asked(NamedTuple):
    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    route: dict[str, Any]  # Any: JSON


def ask(cluster: Cluster, prompt: str) -> Asked:
    raw = cluster.openai().completions.with_raw_response.create(
        model=MODEL_NAME, prompt=prompt, max_tokens=2, temperature=0, extra_headers={"x-phloem-explain": "1"}
    )
    usage = raw.parse().usage
    assert usage is not None and usage.prompt_tokens_details is not None
    route = json.loads(raw.headers["x-phloem-route"])
    cached = usage.prompt_tokens_details.cached_tokens or 0
    return Asked(raw.headers["x-request-id"], usage.prompt_tokens, cached, route)


def debug(cluster: Cluster, request_id: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{cluster.url}/debug/requests/{request_id}", timeout=10) as response:
        return dict(json.load(response))


def test_explanation_agrees_with_usage_and_the_debug_route(pair: Cluster) -> None:
    first, second = ask(pair, PROMPT), ask(pair, PROMPT)
    for asked in (first, second):
        route = asked.route
        assert (route["request_id"], route["policy"]) == (asked.request_id, "cost")
        assert route["decode"] == "decode-0"
        assert route["prefill"] == ("prefill-0" if route["kind"] == "pair" else "decode-0")
        assert {"prefill_queue", "prefill", "decode"} <= set(route["terms"])
        assert {part["part"]: part["of"] for part in route["candidates"]} == {
            "prefill": 1,
            "decode": 1,
            "both": 1,
        }
        assert route["cached_tokens"]["achieved"] == asked.num_cached_tokens
        assert route["prompt_tokens"] == asked.num_prompt_tokens
    # The gateway knew where it had sent the prompt, or the index did.
    assert second.route["cached_tokens"]["achievable"] >= 64
    report = debug(pair, second.request_id)
    assert report["achieved_cached_tokens"] == second.num_cached_tokens
    assert report["achievable_cached_tokens"] == second.route["cached_tokens"]["achievable"]
    decision = report["attempts"][-1]["decision"]
    assert decision["decode"]["worker_id"] == "decode-0"
    assert decision["terms"] == pytest.approx(second.route["terms"], abs=1e-5)


def test_stream_has_the_header_too_and_metrics_count_it(pair: Cluster) -> None:
    body = {"model": MODEL_NAME, "prompt": "One, two, three,", "max_tokens": 4, "stream": True}
    request = urllib.request.Request(
        f"{pair.url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json", "x-phloem-explain": "1"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        route = json.loads(response.headers["x-phloem-route"])
        assert response.read().rstrip().endswith(b"data: [DONE]")
    assert route["decode"] == "decode-0"
    with urllib.request.urlopen(f"{pair.url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    decided = [line for line in lines if line.startswith("phloem_routing_decisions_total{")]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in decided) >= 1
    assert any(line.startswith("phloem_routing_achievable_cached_tokens_total") for line in lines)


def test_unknown_request_is_not_found(pair: Cluster) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        debug(pair, "req-of-nobody")

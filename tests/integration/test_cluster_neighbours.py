"""Requests beside others: bad ones, too many for the pool, and those whose worker dies."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import APIStatusError

from phloem.shared.protocol.session import (
    Ended,
    Hello,
    SamplingParams,
    StepMessage,
    Submit,
    session_down,
    session_up,
)
from phloem.shared.protocol.worker_rpc import WORKER_SERVICE
from phloem.shared.rpc.client import RpcChannel
from tests.support.cluster import MODEL_NAME, SECRET, Cluster, running_cluster

PROMPT = "The history of the city begins"
FLOAT32 = ("--dtype", "float32")
RESUME_BOUND_S = 10.0


def post(cluster: Cluster, path: str, body: bytes) -> tuple[int, dict[str, object]]:
    """Status and the `error` object of an answer that is one."""
    request = urllib.request.Request(
        f"{cluster.url}{path}", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status), {}
    except urllib.error.HTTPError as error:
        return error.code, dict(json.loads(error.read())["error"])


# -- bad requests beside good ones --------------------------------------------------------------------------

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BAD: list[tuple[str, bytes | dict[str, object], int]] = [
    (COMPLETIONS, b"{", 400),
    (COMPLETIONS, {"prompt": 3.5}, 400),
    (COMPLETIONS, {"prompt": "x", "max_tokens": -1}, 400),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 1_000_000}, 400),
    (COMPLETIONS, {"prompt": "x " * 9000}, 400),
    (COMPLETIONS, {"prompt": "x", "temperature": "hot"}, 400),
    (COMPLETIONS, {"prompt": "x", "top_p": 7}, 400),
    (COMPLETIONS, {"prompt": "x", "n": 100_000}, 400),
    (COMPLETIONS, {"prompt": [49_152]}, 400),
    (COMPLETIONS, {"prompt": ""}, 400),
    (COMPLETIONS, {"prompt": "x", "model": "another"}, 404),
    (CHAT, {"messages": []}, 400),
    (CHAT, {"messages": [{"role": 1, "content": "x"}]}, 400),
    (CHAT, {"messages": "x"}, 400),
]


def encoded(body: bytes | dict[str, object]) -> bytes:
    return body if isinstance(body, bytes) else json.dumps({"model": MODEL_NAME, **body}).encode()


@pytest.fixture(scope="module")
def exact_pair(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One prefill and one decode worker in float32: the same tokens whoever else is in the batch."""
    with running_cluster(smollm2_dir, tmp_path_factory.mktemp("logs"), worker_flags=FLOAT32) as cluster:
        yield cluster


def test_bad_requests_get_their_own_error_and_touch_nobody_else(exact_pair: Cluster) -> None:
    expected = exact_pair.generate(PROMPT, 100)
    before = exact_pair.counters("prefill-0")
    with ThreadPoolExecutor(16) as pool:
        good = [pool.submit(exact_pair.generate, PROMPT, 100) for _ in range(4)]
        bad = [pool.submit(post, exact_pair, path, encoded(body)) for path, body, _ in BAD * 3]
        found = [future.result(60) for future in bad]
        assert [future.result(60) for future in good] == [expected] * 4
    for (path, body, status), (code, error) in zip(BAD * 3, found, strict=True):
        assert code == status, f"{path} {body!r:.80}: {code} {error}"
        assert error["message"] and error["type"], f"{path} {body!r:.80}"
    exact_pair.assert_audits_clean()
    reached = exact_pair.counters("prefill-0")
    assert reached["steps"] - before["steps"] < 100, "the workers computed for the good ones alone"


def test_every_message_of_a_real_worker_is_of_another_step(exact_pair: Cluster) -> None:
    """32 streams of one gateway: what a step made for all of them is one message, by its number."""
    record = exact_pair.worker("decode-0")

    async def watch() -> list[StepMessage]:
        channel = RpcChannel(record.rpc_address, SECRET.encode())
        try:
            stream = channel.stream(WORKER_SERVICE, "Session", session_down, session_up)
            await stream.write(Hello("one message per step"))
            for number in range(32):
                await stream.write(
                    Submit(
                        request_id=f"r{number}",
                        attempt=1,
                        epoch=record.epoch,
                        phase="both",
                        token_ids=[100 + number, 200, 300],
                        num_prompt_tokens=3,
                        sampling=SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True),
                    )
                )
            messages: list[StepMessage] = []
            ended = 0
            async with asyncio.timeout(60):
                async for message in stream:
                    if isinstance(message, StepMessage):
                        messages.append(message)
                        ended += sum(isinstance(output, Ended) for output in message.outputs)
                    if ended == 32:
                        return messages
            raise AssertionError("the session ended first")
        finally:
            await channel.close()

    messages = asyncio.run(watch())
    steps = [message.step for message in messages]
    assert steps == sorted(set(steps)), "two messages of one step"
    assert max(len(message.outputs) for message in messages) >= 16, "a message holds many requests' tokens"
    assert len(messages) < 32 * 20 / 4


# -- a pool that is smaller than the context ----------------------------------------------------------------


def test_pool_smaller_than_the_context_refuses_what_never_fits_and_serves_the_rest(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    small = (*FLOAT32, "--max-total-tokens", "160")
    with running_cluster(
        smollm2_dir, tmp_path, prefill=0, decode=0, unified=1, worker_flags=small
    ) as cluster:
        prompts = [f"{PROMPT} with the number {number}, and then" for number in range(6)]
        alone = [cluster.generate(prompt, 32) for prompt in prompts]
        with ThreadPoolExecutor(6) as pool:  # six of 45 tokens don't fit at once
            together = list(pool.map(lambda prompt: cluster.generate(prompt, 32), prompts))
        assert together == alone
        assert cluster.counters("unified-0")["retractions"] > 0
        code, error = post(cluster, COMPLETIONS, encoded({"prompt": "x", "max_tokens": 600}))
        assert code == 400, error
        assert "160" in str(error["message"])
        assert cluster.generate(prompts[0], 32) == alone[0]


# -- the only prefill worker dies ---------------------------------------------------------------------------


def test_death_of_the_only_prefill_worker_costs_a_pause_or_one_typed_error(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    long = " ".join(f"Item {number} of the list." for number in range(120))
    with running_cluster(smollm2_dir, tmp_path, worker_flags=FLOAT32) as cluster:
        expected = cluster.generate(PROMPT, 120)
        with ThreadPoolExecutor(2) as pool:
            handed_over = pool.submit(cluster.generate, PROMPT, 120)
            cluster.wait_until(lambda: cluster.audit("decode-0").num_requests == 1, "it is decoding")
            in_prefill = pool.submit(cluster.generate, long, 4)
            cluster.wait_until(lambda: cluster.audit("prefill-0").num_requests >= 1, "it is in prefill")
            cluster.kill_worker("prefill-0")
            killed_at = time.monotonic()
            assert handed_over.result(60) == expected, "decode has all that it needs"
            try:
                text = in_prefill.result(60)
            except APIStatusError as error:
                assert error.status_code == 503 and error.response.headers["retry-after"]
                assert time.monotonic() - killed_at < RESUME_BOUND_S
            else:
                assert text, "it was resumed, by a prefill of decode's own"
        cluster.spawn_worker("prefill", "prefill-0")
        cluster.wait_for_workers({"prefill-0", "decode-0"})
        assert cluster.generate(PROMPT, 120) == expected

"""What a user of a running cluster sees: answers, usage, abort on disconnect, and how it is built inside."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil

from tests.support.cluster import MODEL_NAME, Cluster

SESSION_MESSAGES = "phloem_session_messages_total"
QUESTION = "What is the capital of France?"


def ask(cluster: Cluster, question: str, **options: object) -> str:
    answer = cluster.openai().chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=40,
        extra_body=options,
    )
    return answer.choices[0].message.content or ""


def test_streamed_chat_answers_paris(pair: Cluster) -> None:
    stream = pair.openai().chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (37, 8)


def test_streamed_and_whole_answers_are_equal_and_the_prefix_is_cached(pair: Cluster) -> None:
    client = pair.openai()
    prompt = "The three primary colours are"
    whole = client.completions.create(model=MODEL_NAME, prompt=prompt, temperature=0, max_tokens=20)
    stream = client.completions.create(
        model=MODEL_NAME, prompt=prompt, temperature=0, max_tokens=20, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    again = ask(pair, QUESTION), ask(pair, QUESTION)
    assert again[0] == again[1]
    chat = client.chat.completions.create(
        model=MODEL_NAME, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=4
    )
    assert chat.usage is not None and chat.usage.prompt_tokens_details is not None
    assert chat.usage.prompt_tokens_details.cached_tokens == 32


def test_first_token_comes_from_prefill_and_the_rest_from_decode(pair: Cluster) -> None:
    before = pair.counters("prefill-0"), pair.counters("decode-0")
    long = " ".join(f"item {n}" for n in range(200))
    ask(pair, f"Summarise: {long}")
    after = pair.counters("prefill-0"), pair.counters("decode-0")
    assert after[0]["pages_sent"] > before[0]["pages_sent"]
    assert after[1]["bytes_received"] - before[1]["bytes_received"] == (
        after[0]["bytes_sent"] - before[0]["bytes_sent"]
    )
    assert after[1]["steps"] > before[1]["steps"]


def test_same_seed_gives_the_same_text_alone_and_beside_others(pair: Cluster) -> None:
    def sample(seed: int) -> str:
        answer = pair.openai().completions.create(
            model=MODEL_NAME, prompt="Once upon a time", temperature=0.9, top_p=0.95, seed=seed, max_tokens=24
        )
        return answer.choices[0].text

    alone = sample(7)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(sample, [7, 1, 2, 3, 7, 4, 5, 7]))
    assert together[0] == together[4] == together[7] == alone
    assert len(set(together)) == 6


def test_worker_sends_at_most_one_session_message_per_gateway_and_step(pair: Cluster) -> None:
    before = pair.counters("decode-0"), pair.metric("decode-0", SESSION_MESSAGES)
    with ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(lambda n: ask(pair, f"Count from {n} upwards."), range(32)))
    assert len(texts) == 32
    steps = pair.counters("decode-0")["turns"] - before[0]["turns"]
    tokens_steps = pair.counters("decode-0")["steps"] - before[0]["steps"]
    messages = pair.metric("decode-0", SESSION_MESSAGES) - before[1]
    assert 0 < messages <= steps
    # 32 streams of up to 40 tokens share the steps: far fewer messages than tokens.
    assert messages <= 2 * tokens_steps


def test_client_that_disconnects_aborts_on_both_workers(pair: Cluster) -> None:
    body = json.dumps(
        {"model": MODEL_NAME, "prompt": "Tell me a long story.", "max_tokens": 4000, "stream": True}
        | {"ignore_eos": True}
    )
    with socket.create_connection(("127.0.0.1", pair.port), timeout=20) as client:
        request = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{request}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        received = b""
        while received.count(b"data:") < 3:
            received += client.recv(65536)
        assert pair.audit("decode-0").num_requests == 1
    pair.assert_audits_clean(timeout_s=5)


def test_stop_string_ends_the_request_on_the_workers_too(pair: Cluster) -> None:
    text = ask(pair, QUESTION, stop=["capital"])
    assert text == "The "
    pair.assert_audits_clean(timeout_s=5)


def test_every_listening_socket_is_on_loopback(pair: Cluster) -> None:
    ask(pair, "Open all channels.")
    listening = [
        (pid, connection.laddr)
        for pid in pair.all_pids()
        for connection in psutil.Process(pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 6
    assert {address.ip.removeprefix("::ffff:") for _, address in listening} == {"127.0.0.1"}


def test_memory_of_gateway_and_index_stays_small(pair: Cluster) -> None:
    threads = [threading.Thread(target=ask, args=(pair, f"Question {n}?")) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert resident_mib(pair, "gateway") <= 250
    assert resident_mib(pair, "cache-index") <= 120


def resident_mib(cluster: Cluster, name: str) -> float:
    return float(psutil.Process(cluster.processes[name].pid).memory_info().rss / 2**20)


def test_weights_are_held_once_per_worker(pair: Cluster) -> None:
    """Resident memory of an engine: the weights once (269 MB in bf16, 538 in float32), its KV pages in use,
    and torch itself; twice the weights would not fit."""
    for worker in ("prefill-0", "decode-0"):
        memory = psutil.Process(pair.engine_pid(worker)).memory_full_info()
        assert memory.uss / 2**20 <= 1100

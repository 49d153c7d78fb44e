"""A whole cluster answers while its index is flushed, killed and started again."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import redis

from tests.support.cluster import MODEL_NAME, Cluster, running_cluster

REPAIR_S = 5.0
START_S = 30.0  # of a process, on a machine that also computes
PROMPT = "The history of the city begins with the river that it was built beside. " * 16


def ask(cluster: Cluster, prompt: str = PROMPT) -> str:
    answer = cluster.openai().completions.create(
        model=MODEL_NAME, prompt=prompt, temperature=0, max_tokens=4, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].text


@contextmanager
def asked_all_the_time(cluster: Cluster, expected: str) -> Iterator[Callable[[], int]]:
    """Equal requests, one after the other; yields how many were answered rightly so far. Fails with any that
    was not."""
    stop = threading.Event()
    num_answered = 0

    def keep_asking() -> None:
        nonlocal num_answered
        while not stop.is_set():
            assert ask(cluster) == expected
            num_answered += 1

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(keep_asking)
        try:
            yield lambda: num_answered
        finally:
            stop.set()
            asking.result(timeout=60)


def num_failed_open(cluster: Cluster) -> float:
    with urllib.request.urlopen(f"{cluster.url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("phloem_cluster_index_misses_total")
    )


def test_requests_are_served_whatever_the_index_loses(smollm2_dir: Path, tmp_path: Path) -> None:
    with (
        running_cluster(smollm2_dir, tmp_path, prefill=0, decode=0, unified=1) as cluster,
        redis.Redis.from_url(cluster.valkey.url) as link,
    ):
        expected = ask(cluster)

        def is_indexed() -> bool:
            return len(link.keys("phloem:ix:b:*")) >= 3

        cluster.wait_until(is_indexed, "the prompt's blocks are in the index", REPAIR_S)
        with asked_all_the_time(cluster, expected) as answered:
            link.flushall()
            cluster.wait_until(is_indexed, "the index is whole after FLUSHALL", REPAIR_S)

            failed_open = num_failed_open(cluster)
            index = cluster.processes.pop("cache-index")
            index.kill()
            index.wait()
            cluster.wait_until(lambda: num_failed_open(cluster) > failed_open, "misses are counted", START_S)
            before = answered()
            cluster.wait_until(lambda: answered() > before + 1, "requests go on without an index", START_S)

            cluster.spawn("cache-index", "cache-index")
            leases = b"phloem:service:cache_index/*"
            cluster.wait_until(lambda: len(link.keys(leases)) == 1, "a new replica is there", START_S)
            link.flushall()
            cluster.wait_until(is_indexed, "the new replica is told everything", REPAIR_S)
            before = answered()
            cluster.wait_until(lambda: answered() > before + 1, "requests go on", START_S)

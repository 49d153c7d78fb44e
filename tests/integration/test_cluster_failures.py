"""Workers that die, hang, drain, join and leave while requests run; and what is left when all is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.support.cluster import MODEL_NAME, Cluster, running_cluster
from tests.support.valkey import free_port

PROMPT = "The history of the city begins"


def generate(cluster: Cluster, max_tokens: int, prompt: str = PROMPT) -> str:
    return cluster.generate(prompt, max_tokens)


class Stream:
    """A streamed completion on a thread; `started` is set with its first few tokens."""

    def __init__(self, cluster: Cluster, max_tokens: int, prompt: str = PROMPT) -> None:
        self.started = threading.Event()
        self._cluster = cluster
        self._max_tokens = max_tokens
        self._prompt = prompt
        self.longest_pause_s = 0.0  # between two chunks, as the client sees it
        self._pool = ThreadPoolExecutor(1)
        self.text: Future[str] = self._pool.submit(self._run)

    def _run(self) -> str:
        stream = self._cluster.openai().completions.create(
            model=MODEL_NAME,
            prompt=self._prompt,
            temperature=0,
            max_tokens=self._max_tokens,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        pieces = []
        before = time.monotonic()
        for chunk in stream:
            pieces.append(chunk.choices[0].text)
            now = time.monotonic()
            self.longest_pause_s, before = max(self.longest_pause_s, now - before), now
            if len(pieces) == 4:
                self.started.set()
        return "".join(pieces)


@pytest.fixture
def fresh_square(smollm2_dir: Path, tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(
        smollm2_dir, tmp_path, prefill=2, decode=2, worker_flags=("--dtype", "float32")
    ) as c:
        yield c


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_worker_that_dies_or_hangs_mid_stream_costs_a_pause_and_no_token(
    fresh_square: Cluster, role: str, how: signal.Signals
) -> None:
    expected = generate(fresh_square, 120)
    streams = [Stream(fresh_square, 120) for _ in range(4)]
    assert streams[0].started.wait(30)
    victim = busiest(fresh_square, role)
    if how == signal.SIGKILL:
        fresh_square.kill_worker(victim)
    else:
        for pid in (fresh_square.engine_pid(victim), fresh_square.processes[victim].pid):
            os.kill(pid, how)
    assert [stream.text.result(timeout=60) for stream in streams] == [expected] * 4
    assert max(stream.longest_pause_s for stream in streams) < 10
    assert expected.startswith(generate(fresh_square, 8))
    if how == signal.SIGSTOP:
        stopped = fresh_square.processes.pop(victim)
        stopped.kill()
        stopped.wait()
    others = {f"{r}-{n}" for r in ("prefill", "decode") for n in (0, 1)} - {victim}
    fresh_square.wait_for_workers(others)


def busiest(cluster: Cluster, role: str) -> str:
    names = [f"{role}-0", f"{role}-1"]
    return max(names, key=lambda name: cluster.audit(name).num_requests)


def test_death_of_the_only_decode_worker_is_answered_within_ten_seconds(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    with running_cluster(smollm2_dir, tmp_path) as cluster:
        stream = Stream(cluster, 2000)
        assert stream.started.wait(30)
        cluster.kill_worker("decode-0")
        began = time.monotonic()
        with pytest.raises(Exception, match="decode"):
            stream.text.result(timeout=30)
        assert time.monotonic() - began < 10
        cluster.spawn_worker("decode", "decode-0")
        cluster.wait_for_workers({"prefill-0", "decode-0"})
        assert generate(cluster, 4)


def test_workers_join_and_drain_while_requests_run(smollm2_dir: Path, tmp_path: Path) -> None:
    with running_cluster(smollm2_dir, tmp_path) as cluster:
        expected = generate(cluster, 40)
        stop = threading.Event()

        def keep_asking() -> int:
            count = 0
            while not stop.is_set():
                assert generate(cluster, 40) == expected
                count += 1
            return count

        with ThreadPoolExecutor(3) as pool:
            askers = [pool.submit(keep_asking) for _ in range(3)]
            try:
                cluster.spawn_worker("prefill", "prefill-1")
                cluster.spawn_worker("decode", "decode-1")
                cluster.wait_for_workers({"prefill-0", "prefill-1", "decode-0", "decode-1"})
                for name in ("prefill-0", "decode-0"):
                    cluster.signal(name, signal.SIGTERM)
                    assert cluster.processes.pop(name).wait(timeout=60) == 0
                cluster.wait_for_workers({"prefill-1", "decode-1"})
            finally:
                stop.set()
            assert sum(asker.result(timeout=60) for asker in askers) > 3


def test_decode_worker_dies_and_another_joins_while_requests_run(smollm2_dir: Path, tmp_path: Path) -> None:
    """Two prefill and three decode workers, with staging memory for three peers: the one that joins gets what
    the dead one had. Nobody else restarts, and no client sees anything but its tokens."""
    flags = ("--dtype", "float32", "--transfer-peers", "3", "--staging-bytes", str(1 << 20))
    policy = ("--routing-policy", "round_robin")  # all pairs, whatever they cost
    with running_cluster(
        smollm2_dir, tmp_path, prefill=2, decode=3, worker_flags=flags, gateway_flags=policy
    ) as cluster:
        staying = {"prefill-0", "prefill-1", "decode-0", "decode-2"}
        prompts = [f"{PROMPT} in the year {year}, when the river" for year in range(1500, 1506)]
        expected = {prompt: generate(cluster, 24, prompt) for prompt in prompts}
        pids = {name: (cluster.processes[name].pid, cluster.engine_pid(name)) for name in staying}
        stop = threading.Event()

        def keep_asking(prompt: str) -> int:
            count = 0
            while not stop.is_set():
                assert generate(cluster, 24, prompt) == expected[prompt]
                count += 1
            return count

        with ThreadPoolExecutor(len(prompts)) as pool:
            askers = [pool.submit(keep_asking, prompt) for prompt in prompts]
            try:
                cluster.wait_until(lambda: cluster.audit("decode-1").num_requests > 0, "decode-1 is busy")
                cluster.kill_worker("decode-1")
                cluster.spawn_worker("decode", "decode-3")
                cluster.wait_for_workers(staying | {"decode-3"})
                cluster.wait_until(
                    lambda: (
                        cluster.counters("decode-3")["channels"] == 2
                        and cluster.counters("decode-3")["pages_received"] > 0
                    ),
                    "decode-3 is handed requests over",
                )
            finally:
                stop.set()
            assert min(asker.result(timeout=60) for asker in askers) > 0
        assert pids == {n: (cluster.processes[n].pid, cluster.engine_pid(n)) for n in staying}
        for name in staying:
            assert cluster.counters(name)["channels"] == (3 if name.startswith("prefill") else 2)


def test_pair_without_staging_memory_is_not_chosen_until_there_is_some(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    """One prefill worker with memory for one peer, two decode workers: requests take the pair that there is,
    and the other one when the first decode worker has died."""
    flags = ("--dtype", "float32", "--transfer-peers", "1", "--staging-bytes", str(1 << 20))
    policy = ("--routing-policy", "round_robin")
    with running_cluster(
        smollm2_dir, tmp_path, decode=2, worker_flags=flags, gateway_flags=policy
    ) as cluster:

        def num_cut_off() -> float:
            return cluster.metric("prefill-0", "phloem_engine_cut_off_peers")

        def received(name: str) -> int:
            return cluster.counters(name)["pages_received"]

        cluster.wait_until(lambda: num_cut_off() == 1, "one decode worker is cut off")
        assert "prefill-0 has staging memory for 1 peer," in cluster.log("prefill-0")
        joined, other = sorted(("decode-0", "decode-1"), key=lambda name: -cluster.counters(name)["channels"])
        assert "prefill-0 has staging memory for 1 peer," in cluster.log(other)
        before = received(joined)
        for number in range(6):
            assert generate(cluster, 4, f"{PROMPT} with the number {number}, and then")
        assert received(joined) > before and received(other) == 0
        cluster.kill_worker(joined)
        cluster.wait_until(lambda: num_cut_off() == 0, "the other one is joined")
        cluster.wait_until(lambda: cluster.counters(other)["channels"] == 1, "its channel is open")
        cluster.wait_for_workers({"prefill-0", other})
        for number in range(6):
            assert generate(cluster, 4, f"{PROMPT} with the number {number}, and so")
        assert received(other) > 0


def test_redis_that_dies_and_comes_back_empty_fails_no_request(smollm2_dir: Path, tmp_path: Path) -> None:
    with running_cluster(smollm2_dir, tmp_path) as cluster:
        expected = generate(cluster, 16)
        cluster.valkey.stop()
        assert generate(cluster, 16) == expected
        cluster.valkey.start()
        cluster.wait_for_workers({"prefill-0", "decode-0"})
        assert generate(cluster, 16) == expected


def test_no_process_survives_sigkill_of_up(smollm2_dir: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "phloem.cli.main", "up", "--port", str(port), "--model-path"]
    command += [str(smollm2_dir), "--run-dir", str(tmp_path)]
    up = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert up.stdout is not None
    output = ""
    for line in up.stdout:
        output += line
        if "Ctrl-C stops the cluster" in line:
            break
    assert "Paris" in output
    children = psutil.Process(up.pid).children(recursive=True)
    assert len(children) >= 7
    up.kill()
    up.wait()
    up.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []


@pytest.mark.parametrize(
    ("host", "workers"),
    [("127.0.0.1", ("--unified", "1", "--prefill", "0", "--decode", "0")), ("::1", ())],
)
def test_sigterm_of_up_stops_everything_and_exits_cleanly(
    smollm2_dir: Path, tmp_path: Path, host: str, workers: tuple[str, ...]
) -> None:
    """By then the cluster has answered a question, on that address."""
    port = free_port()
    command = [sys.executable, "-m", "phloem.cli.main", "up", "--port", str(port), "--model-path"]
    command += [str(smollm2_dir), "--run-dir", str(tmp_path), "--host", host, *workers]
    up = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert up.stdout is not None
    for line in up.stdout:
        if "Ctrl-C stops the cluster" in line:
            break
    children = psutil.Process(up.pid).children(recursive=True)
    up.send_signal(signal.SIGTERM)
    assert up.wait(timeout=30) == 0
    up.stdout.close()
    assert [child for child in children if child.is_running()] == []


def test_cluster_is_told_what_is_wrong(smollm2_dir: Path, tmp_path: Path) -> None:
    """A flag out of range, a path that is no model, and a Redis that is not there: one sentence each."""

    def run(*argv: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "phloem.cli.main", *argv], capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout + done.stderr

    code, text = run("serve", "prefill", "--page-size", "65")
    assert code == 2 and "--page-size" in text and "Traceback" not in text
    code, text = run("serve", "prefill", "--pagesize", "16")
    assert code == 2 and "--page-size" in text and "Traceback" not in text
    redis = ("--redis-url", f"redis://127.0.0.1:{free_port()}/0", "--redis-wait-s", "1")
    code, text = run("serve", "decode", "--model-path", str(smollm2_dir), *redis)
    assert code == 1 and "redis" in text.lower() and "Traceback" not in text
    code, text = run("up", "--port", str(free_port()), "--model-path", str(tmp_path / "nothing"))
    assert code != 0 and "nothing" in text and "Traceback" not in text
    (tmp_path / "file.txt").write_text(json.dumps({}))
    code, text = run("up", "--port", str(free_port()), "--model-path", str(tmp_path))
    assert code != 0 and "config.json" in text and "Traceback" not in text

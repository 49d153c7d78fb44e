"""`phloem up` on this machine: a worker joins its cluster by nothing but its Redis; another one stops."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

from tests.support.valkey import die_with_parent, free_port
from tests.support.waiting import wait_until_gone

DEADLINE_S = 120.0


@contextmanager
def phloem(*argv: str, log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-u", "-m", "phloem.cli.main", *argv]
    process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=die_with_parent)
    try:
        yield process
        process.terminate()
        assert process.wait(timeout=DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()


def redis_url(run_dir: Path) -> str:
    """Of the Valkey that `up` has brought, as the README says where to look."""
    lines = (run_dir / "valkey.conf").read_text().splitlines()
    conf = dict(line.split(" ", 1) for line in lines)
    return f"redis://:{conf['requirepass']}@127.0.0.1:{conf['port']}"


def worker_of_an_answer(port: int, number: int) -> str:
    """Who generated for a prompt that nobody has seen."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/generate",
        json.dumps({"input_ids": [number + 1000] * 8, "sampling_params": {"max_new_tokens": 1}}).encode(),
        {"Content-Type": "application/json", "x-phloem-explain": "1"},
    )
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
        return str(json.loads(response.headers["x-phloem-route"])["decode"])


def answers(port: int) -> bool:
    try:
        return worker_of_an_answer(port, 1) == "unified-0"
    except urllib.error.HTTPError:
        return False


@contextmanager
def up(
    model_dir: Path, tmp_path: Path, *flags: str
) -> Iterator[tuple[subprocess.Popen[bytes], int, Path, Path]]:
    """A cluster of one worker, which serves: its process, the gateway's port, run folder, what it prints."""
    port, run_dir, shown = free_port(), tmp_path / "run", tmp_path / "up.log"
    argv = ("up", "--port", str(port), "--run-dir", str(run_dir), "--model-path", str(model_dir), "--no-ask")
    one_worker = ("--prefill", "0", "--decode", "0", "--unified", "1")
    with shown.open("wb") as log, phloem(*argv, *one_worker, *flags, log=log) as process:
        wait_for_line("Ctrl-C stops the cluster", shown, process)
        yield process, port, run_dir, shown


def wait_for_line(text: str, shown: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while text not in shown.read_text():
        assert process.poll() is None and time.monotonic() < deadline, shown.read_text()
        time.sleep(0.05)


def test_worker_joins_a_cluster_of_up_by_its_redis(smollm2_dir: Path, tmp_path: Path) -> None:
    with up(smollm2_dir, tmp_path) as (_, port, run_dir, shown), shown.open("ab") as log:
        joining = ("--redis-url", redis_url(run_dir), "--worker-id", "joined")
        with phloem("serve", "unified", *joining, "--model-path", str(smollm2_dir), log=log):
            number, deadline = 0, time.monotonic() + DEADLINE_S
            while worker_of_an_answer(port, number) != "joined":
                number += 1
                assert time.monotonic() < deadline, shown.read_text()


def test_worker_whose_front_is_stopped_is_started_again_with_a_new_engine(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    with up(smollm2_dir, tmp_path, "--hang-timeout-s", "1") as (process, port, _, shown):
        services = psutil.Process(process.pid).children()
        front = next(child for child in services if "unified" in child.cmdline())
        engines = front.children()
        assert engines
        front.send_signal(signal.SIGSTOP)
        wait_for_line(
            "unified-0 runs, but has not been in the registry for 1 s: it is killed", shown, process
        )
        wait_for_line("unified-0 started again", shown, process)
        for engine in engines:
            wait_until_gone(engine.pid)
        deadline = time.monotonic() + DEADLINE_S
        while not answers(port):
            assert time.monotonic() < deadline, shown.read_text()
            time.sleep(0.1)

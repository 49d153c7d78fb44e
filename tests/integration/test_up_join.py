"""`phloem up` on this machine, and a worker that joins its cluster by nothing but its Redis."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tests.support.valkey import die_with_parent, free_port

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


def test_worker_joins_a_cluster_of_up_by_its_redis(smollm2_dir: Path, tmp_path: Path) -> None:
    port, run_dir, shown = free_port(), tmp_path / "run", tmp_path / "up.log"
    model = ("--model-path", str(smollm2_dir))
    one_worker = ("--prefill", "0", "--decode", "0", "--unified", "1")
    with shown.open("wb") as log:
        up = phloem(
            "up", "--port", str(port), "--run-dir", str(run_dir), "--no-ask", *one_worker, *model, log=log
        )
        with up as process:
            deadline = time.monotonic() + DEADLINE_S
            while "Ctrl-C stops the cluster" not in shown.read_text():
                assert process.poll() is None and time.monotonic() < deadline, shown.read_text()
                time.sleep(0.05)
            joining = ("--redis-url", redis_url(run_dir), "--worker-id", "joined")
            with phloem("serve", "unified", *joining, *model, log=log):
                number = 0
                while worker_of_an_answer(port, number) != "joined":
                    number += 1
                    assert time.monotonic() < deadline, shown.read_text()

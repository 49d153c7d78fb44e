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
import os
import signal
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from benchmarks.gateway.client import Outcome
from benchmarks.gateway.groups import by_group
from benchmarks.gateway.processes import Bench, Options, Server
from benchmarks.gateway.report import bars_of, show_costs
from benchmarks.samples import Samples
from phloem.shared.bench.bars import all_met, bar_lines


def one_round(bench: Bench, gateway: Server, samples: Samples) -> None:
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
        samples.add(f"flat out, {name} [tokens/s]", num_tokens / sample.outcome.seconds)
    samples.add("flat out, gateway [tokens per event]", num_tokens / flat.outcome.num_events)
    for name, sample in (("bare", flat_bare), ("gateway", flat)):
        samples.add(f"flat out, {name} CPU [us per token]", sample.cpu_s / num_tokens * 1e6)
        samples.add(f"flat out, client's CPU beside {name} [%]", used(sample.outcome))
    samples.add("paced, gateway [tokens per event]", num_tokens / paced.outcome.num_events)
    for name, sample in (("bare", paced_bare), ("gateway", paced)):
        samples.add(f"paced, {name} CPU [us per token]", sample.cpu_s / num_tokens * 1e6)
    for name, sample in (
        ("bare", requests_bare),
        ("gateway", requests),
        ("gateway, 1k prompt", long_requests),
    ):
        samples.add(f"requests, {name} [requests/s]", sample.outcome.num_requests / sample.outcome.seconds)
        samples.add(f"requests, {name} CPU [us]", sample.cpu_s / sample.outcome.num_requests * 1e6)


def used(outcome: Outcome) -> float:
    return 100 * outcome.cpu_s / outcome.seconds


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
        one_round(bench, gateway, Samples())  # warm
        samples = Samples()
        for _ in range(options.rounds):
            one_round(bench, gateway, samples)
        print(f"{options.streams} streams x {options.tokens} tokens, {options.rounds} rounds, medians:")
        bars = bars_of(samples)
        print("\n".join([*samples.lines(), "", *bar_lines(bars)]))
        show_costs(samples, options.tokens)
        if options.profile:
            profile(bench, Path(options.profile))
    return int(options.check and not all_met(bars))


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

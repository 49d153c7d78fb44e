"""The demo model on the CPU: Phloem over HTTP beside plain transformers, and 1P1D beside unified.

    python benchmarks/bench_cpu.py [--dtype float32] [--rounds 5] [--check]

Starts two clusters with `phloem up` (one prefill + one decode worker; one unified worker) and loads the
same weights into transformers in this process. Each round measures all of them in turn, so that a noisy
machine is noisy for all; ratios are of medians over the rounds. With `--check` the exit status says
whether the bars hold.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.samples import Samples
from phloem.shared.bench.bars import Bar, all_met, bar_lines
from phloem.shared.model_store.resolve import default_cache_dir, resolve_model

MODEL = "smollm2-135m-instruct"
PROMPT_TOKENS = 64
NEW_TOKENS = 96
STREAMS = 8
PREFILL_TOKENS = 1024
TTFT_LENGTHS = (128, 512, 1024)


class Timing(NamedTuple):
    """Of one streamed request, in seconds on this process's clock."""

    start: float
    first: float
    last: float
    num_tokens: int


@contextmanager
def running_up(flags: list[str]) -> Iterator[int]:
    """A cluster by `phloem up`; yields the port of its gateway."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "phloem.cli.main", "up", "--port", str(port), "--no-ask", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        shown = []
        for line in process.stdout:
            shown.append(line)
            if "Ctrl-C stops the cluster" in line:
                break
        else:
            raise SystemExit("phloem up failed:\n" + "".join(shown))
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        process.stdout.close()


def stream(port: int, prompt: list[int], max_tokens: int) -> Timing:
    """One streamed completion over token ids."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"HTTP {response.status}: {response.read().decode()}")
    first = last = 0.0
    num_tokens = 0
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event["choices"]:
            last = time.perf_counter()
            first = first or last
        elif event.get("usage"):
            num_tokens = event["usage"]["completion_tokens"]
    connection.close()
    assert num_tokens == max_tokens, f"{num_tokens} of {max_tokens} tokens came"
    return Timing(start, first, last, num_tokens)


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1000, 40_000) for _ in range(length)]


# Any: transformers' classes are untyped here.
class Reference:
    """transformers with the same weights, dtype and threads."""

    def __init__(self, model_dir: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
        self._model.eval()

    @torch.inference_mode()
    def decode_tokens_per_s(self, prompt: list[int]) -> float:
        """`generate` of many tokens less `generate` of one, so that the prompt's time drops out."""
        ids = torch.tensor([prompt])
        long = timed(lambda: self._generate(ids, NEW_TOKENS))
        short = timed(lambda: self._generate(ids, 1))
        return (NEW_TOKENS - 1) / (long - short)

    @torch.inference_mode()
    def prefill_s(self, prompt: list[int]) -> float:
        """One forward pass that asks for the last token's logits only."""
        ids = torch.tensor([prompt])
        return timed(lambda: self._model(ids, use_cache=True, logits_to_keep=1))

    def _generate(self, ids: torch.Tensor, count: int) -> None:
        mask = torch.ones_like(ids)
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        self._model.generate(ids, attention_mask=mask, **options)


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def decode_rate(timing: Timing) -> float:
    return (timing.num_tokens - 1) / (timing.last - timing.first)


def concurrent_rate(port: int, prompts: list[list[int]]) -> float:
    """Tokens per second of all streams together, from the last one's first token on."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        timings = list(pool.map(lambda prompt: stream(port, prompt, NEW_TOKENS), prompts))
    start, end = max(t.first for t in timings), min(t.last for t in timings)
    rates = [decode_rate(t) for t in timings]
    assert end > start, "the streams did not overlap"
    return sum(rates)


def measure(samples: Samples, reference: Reference, pair: int, unified: int, rng: random.Random) -> None:
    prompt = random_prompt(rng, PROMPT_TOKENS)
    samples.add("transformers decode, batch 1 [tok/s]", reference.decode_tokens_per_s(prompt))
    samples.add("1P1D decode, batch 1 [tok/s]", decode_rate(stream(pair, prompt, NEW_TOKENS)))
    prompts = [random_prompt(rng, PROMPT_TOKENS) for _ in range(STREAMS)]
    samples.add(f"1P1D decode, {STREAMS} streams [tok/s]", concurrent_rate(pair, prompts))
    long = random_prompt(rng, PREFILL_TOKENS)
    samples.add("transformers forward, 1024 tokens [ms]", 1e3 * reference.prefill_s(long))
    for length in TTFT_LENGTHS:
        targets = [("1P1D", pair), ("unified", unified)]
        rng.shuffle(targets)
        for name, port in targets:
            timing = stream(port, random_prompt(rng, length), 2)
            samples.add(f"{name} TTFT, {length} tokens [ms]", 1e3 * (timing.first - timing.start))


def bars_of(samples: Samples) -> list[Bar]:
    def ratio(above: str, below: str) -> float:
        return samples.median(above) / samples.median(below)

    one = "1P1D decode, batch 1 [tok/s]"
    return [
        Bar(
            "batch-1 decode / transformers",
            ratio(one, "transformers decode, batch 1 [tok/s]"),
            "x",
            0.9,
            ">=",
        ),
        Bar("8 streams / batch 1", ratio(f"1P1D decode, {STREAMS} streams [tok/s]", one), "x", 3.0, ">="),
        Bar(
            "prefill 1024 / transformers",
            ratio("transformers forward, 1024 tokens [ms]", "1P1D TTFT, 1024 tokens [ms]"),
            "x",
            0.9,
            ">=",
        ),
        *(
            Bar(
                f"TTFT 1P1D / unified, {length} tokens",
                ratio(f"1P1D TTFT, {length} tokens [ms]", f"unified TTFT, {length} tokens [ms]"),
                "x",
                1.15,
            )
            for length in TTFT_LENGTHS
        ),
    ]


def sleep_between_work() -> None:
    """Restarts this process so that OpenMP's idle threads sleep, as those of the workers do: otherwise the
    reference and the clusters would take the cores from each other."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    options = parser.parse_args()
    sleep_between_work()
    model_dir = resolve_model(MODEL, cache_dir=default_cache_dir())
    flags = ["--dtype", options.dtype, "--model-path", MODEL]
    reference = Reference(model_dir, options.dtype)
    rng = random.Random(0)
    with (
        running_up([*flags, "--prefill", "1", "--decode", "1"]) as pair,
        running_up([*flags, "--prefill", "0", "--decode", "0", "--unified", "1"]) as unified,
    ):
        measure(Samples(), reference, pair, unified, rng)  # warm-up
        samples = Samples()
        for _ in range(options.rounds):
            measure(samples, reference, pair, unified, rng)
    print(
        f"\n{MODEL}, {options.dtype}, {len(os.sched_getaffinity(0))} cores, median of {options.rounds} rounds"
    )
    bars = bars_of(samples)
    print("\n".join([*samples.lines(), *bar_lines(bars)]))
    return 1 if options.check and not all_met(bars) else 0


if __name__ == "__main__":
    sys.exit(main())

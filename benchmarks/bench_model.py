"""The decoder against plain transformers, in one process and one run: same model, dtype and threads.

    python benchmarks/bench_model.py [--dtype bfloat16] [--threads 2] [--rounds 3] [--cpu-time]

Both sides are measured in turns, and the median of the rounds counts: the machine may be shared. Where it
is busy, `--cpu-time` counts the seconds that this process computed on all its threads instead of those that
passed: ratios stay meaningful, the rates are then per core. Needs the demo model in the cache (fetched on
the first run).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Read when torch loads its OpenMP: threads that wait must not take the cores from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from phloem.kernels import ops
from phloem.shared.engine.models.batch import ForwardBatch
from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.weights.loader import DTYPES, load_decoder
from phloem.shared.model_store.resolve import default_cache_dir, resolve_model

CPU = torch.device("cpu")
PAGE_SIZE = 16
NUM_DECODED = 32
DECODE_PROMPT = 128
PREFILL_LEN = 1024
BATCH = 8
# Streams at different places, as in a running batch: 100 to 590 tokens of context.
BATCH_CONTEXTS = [100 + 70 * stream for stream in range(BATCH)]
MIB = 1024 * 1024


class Row(NamedTuple):
    """One line of the report, in tokens/s; `bar` is what `ratio` must reach."""

    name: str
    ours: float
    theirs: float
    bar: float

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


class PagedStreams:
    """Streams that decode together: contexts of the given lengths, each on pages of its own."""

    def __init__(self, decoder: Decoder, contexts: list[int], *, scattered: bool) -> None:
        pages_each = -(-(max(contexts) + NUM_DECODED + 1) // PAGE_SIZE)
        count = len(contexts) * pages_each
        page_ids = torch.arange(count)
        if scattered:
            page_ids = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        self._decoder = decoder
        self._lens = list(contexts)
        self._page_table = page_ids.view(len(contexts), pages_each)
        self._kv = KVCache.allocate(decoder.config, count, PAGE_SIZE, decoder.dtype, CPU)
        self._last = torch.ones(len(contexts), dtype=torch.int64)

    def fill(self) -> None:
        """Prefills every context, one sequence at a time."""
        for row, length in enumerate(self._lens):
            ids = prompt(length, seed=row)
            at = torch.arange(length)
            slots = self._page_table[row][at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
            pages = self._page_table[row : row + 1]
            wanted = torch.tensor([length - 1])
            batch = ForwardBatch(ids, at, slots, [length], [length], pages, wanted)
            self._last[row] = self._decoder.forward(batch, self._kv).argmax(-1)

    def decode(self, num_steps: int) -> None:
        rows = torch.arange(len(self._lens))
        for _ in range(num_steps):
            at = torch.tensor(self._lens)
            slots = self._page_table[rows, at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
            self._lens = [length + 1 for length in self._lens]
            query_lens = [1] * len(self._lens)
            batch = ForwardBatch(self._last, at, slots, query_lens, self._lens, self._page_table, rows)
            self._last = self._decoder.forward(batch, self._kv).argmax(-1)


def prompt(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 49_000, (length,), generator=torch.Generator().manual_seed(seed))


class Bench:
    """Measures both sides by one clock."""

    def __init__(self, decoder: Decoder, model: Any, clock: Callable[[], float]) -> None:
        self._decoder = decoder
        self._model = model
        self._clock = clock

    def _seconds(self, work: Callable[[], object]) -> float:
        return seconds(work, self._clock)

    def their_decode_s(self, batch: int) -> float:
        """Seconds per step of transformers' own generate loop, the prefill taken off."""
        ids = prompt(DECODE_PROMPT * batch).view(batch, DECODE_PROMPT)
        first = self._seconds(lambda: generate(self._model, ids, 1))
        return (self._seconds(lambda: generate(self._model, ids, NUM_DECODED + 1)) - first) / NUM_DECODED

    def our_decode_s(self, contexts: list[int], *, scattered: bool) -> float:
        streams = PagedStreams(self._decoder, contexts, scattered=scattered)
        streams.fill()
        return self._seconds(lambda: streams.decode(NUM_DECODED)) / NUM_DECODED

    def their_prefill_s(self) -> float:
        ids = prompt(PREFILL_LEN).unsqueeze(0)
        with torch.inference_mode():
            return self._seconds(lambda: self._model(ids, use_cache=True, logits_to_keep=1))

    def our_prefill_s(self) -> float:
        return self._seconds(PagedStreams(self._decoder, [PREFILL_LEN], scattered=True).fill)

    def rows(self, rounds: int) -> list[Row]:
        works: dict[str, Callable[[], float]] = {
            "their decode 1": lambda: self.their_decode_s(1),
            "our decode 1": lambda: self.our_decode_s([DECODE_PROMPT], scattered=False),
            "our decode 1 scattered": lambda: self.our_decode_s([DECODE_PROMPT], scattered=True),
            "their decode 8": lambda: self.their_decode_s(BATCH),
            "our decode 8": lambda: self.our_decode_s(BATCH_CONTEXTS, scattered=False),
            "our decode 8 scattered": lambda: self.our_decode_s(BATCH_CONTEXTS, scattered=True),
            "their prefill": self.their_prefill_s,
            "our prefill": self.our_prefill_s,
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(rounds + 1):
            for name, work in works.items():
                taken = work()
                if turn > 0:  # the first round warms up
                    times[name].append(taken)
        return table({name: statistics.median(values) for name, values in times.items()})


def table(s: dict[str, float]) -> list[Row]:
    """The report's lines from the medians, seconds per step or per prefill."""
    one, eight = 1 / s["our decode 1"], BATCH / s["our decode 8"]
    theirs = 1 / s["their decode 1"]
    return [
        Row("decode, batch 1", one, theirs, 1.0),
        Row("decode, batch 1, scattered pages", 1 / s["our decode 1 scattered"], theirs, 1.0),
        Row("decode, batch 8", eight, BATCH / s["their decode 8"], 1.0),
        Row("decode, batch 8 / our batch 1", eight, one, 3.3),
        Row("decode, batch 8, scattered / batch 1", BATCH / s["our decode 8 scattered"], one, 3.3),
        Row("prefill 1024", PREFILL_LEN / s["our prefill"], PREFILL_LEN / s["their prefill"], 1.0),
    ]


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    work()
    return clock() - start


def generate(model: Any, ids: Tensor, num_new: int) -> None:
    model.generate(
        ids,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        do_sample=False,
        attention_mask=torch.ones_like(ids),
    )


def report(title: str, rows: list[Row]) -> None:
    print(f"\n{title}\n{'':38}{'ours':>9}{'other':>9}  ratio   bar")
    for row in rows:
        verdict = "" if row.ratio >= row.bar else "  below"
        print(f"{row.name:38}{row.ours:9.1f}{row.theirs:9.1f}  {row.ratio:5.2f}  {row.bar:4.1f}{verdict}")


def median_ms(work: Callable[[], object]) -> float:
    return statistics.median(seconds(work) for _ in range(20)) * 1e3


def bench_digest() -> None:
    """Gather and scatter of 16 MiB of pages, digest included."""
    shape = (4096, PAGE_SIZE, 3, 64)
    planes = [torch.randn(shape).to(torch.bfloat16) for _ in range(4)]
    kv = KVCache(planes[:2], planes[2:])
    page_ids = torch.randperm(4096)[: 16 * MIB // (4 * planes[0][0].numel() * 2)]
    staging = torch.empty(16 * MIB, dtype=torch.uint8)
    gather_ms = median_ms(lambda: ops.gather_pages(kv, page_ids, 0, 2, staging))
    scatter_ms = median_ms(lambda: ops.scatter_pages(kv, page_ids, 0, 2, staging))
    print(f"16 MiB of pages with digest: gather {gather_ms:.2f} ms, scatter {scatter_ms:.2f} ms")


def bench_sampling() -> None:
    """One step's sampling of 8 streams over the demo model's vocabulary."""
    logits = torch.randn(BATCH, 49_152) * 3
    settings = {
        "greedy": (0.0, 0, 1.0, 0.0),
        "temperature": (0.8, 0, 1.0, 0.0),
        "top-p 0.9": (0.8, 0, 0.9, 0.0),
        "top-k 50, top-p 0.9": (0.8, 50, 0.9, 0.0),
        "min-p 0.05": (0.8, 0, 1.0, 0.05),
    }
    for name, setting in settings.items():
        print(f"sample 8 rows, {name}: {median_ms(sampler(logits, *setting)):.2f} ms")


def sampler(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Callable[[], object]:
    ids = torch.arange(len(logits))
    heat, nucleus, floor = (torch.full((len(logits),), value) for value in (temperature, top_p, min_p))
    return lambda: ops.sample(logits, heat, torch.full_like(ids, top_k), nucleus, floor, ids, ids)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", default="smollm2-135m-instruct")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir())
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model_dir = resolve_model(options.model_path, cache_dir=options.cache_dir)
    for name in options.dtype or ["float32", "bfloat16"]:
        dtype = DTYPES[name]
        decoder = load_decoder(
            model_dir, load_format="auto", dtype=dtype, device=CPU, progress=lambda done, total: None
        )
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
        clock = time.process_time if options.cpu_time else time.perf_counter
        report(f"{name}, {options.threads} threads", Bench(decoder, model, clock).rows(options.rounds))
        del decoder, model
    bench_digest()
    bench_sampling()


if __name__ == "__main__":
    main()

"""The prefix index over a real Valkey, beside a bare PING of the same process in the same run.

    python benchmarks/bench_index.py [--check] [--output DIR] [--seconds 10] [--stored-blocks 1000000]

Starts Valkey and one cache_index process. 64 workers publish 1,000,000 blocks (of each conversation one
holds all, three a part). Then look-ups as a gateway makes them, open loop at 200 per second: a random part of
a stored conversation followed by new text, so that nothing repeats and the near cache can't help; a PING of
redis-py half a period after each. Then the same over prompt lengths, workers and stored blocks, one equal
prompt again and again with and without the near cache, memory, and look-ups under their real deadline while
eight more workers publish 20,000 blocks per second from another process.

`--check`: exit status 1 when a bar is missed. `--output DIR`: writes index.json and index.png.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import uvloop

from benchmarks.index.deadlines import PUBLISH_RATE, Deadlines, bench_deadlines
from benchmarks.index.lookups import Timing, measure, some_prompt
from benchmarks.index.world import (
    World,
    new_chain,
    publish_trees,
    running_world,
    used_bytes,
)
from phloem.shared.bench.bars import Bar, all_met, bar_lines
from phloem.shared.block_hash import BLOCK_TOKENS

RATE = 200.0
WORKERS = 64
PROMPT_BLOCKS = 8192 // BLOCK_TOKENS
LENGTHS = (8, 32, 128, 512, 2048)  # blocks: 512 .. 131,072 tokens
NUM_LONG_CHAINS = 16
SATURATING = 16

MAX_P50_RATIO = 8.0
MAX_P99_RATIO = 25.0
MAX_BYTES_PER_BLOCK = 160.0
# A flat curve may still wave: its dearest point against its cheapest.
MAX_FLAT_RATIO = 1.5


class Options(NamedTuple):
    stored_blocks: int
    seconds: float
    check: bool
    output: Path | None


class Figures(msgspec.Struct):
    bytes_per_block: float = 0.0
    saturated_lookups_per_s: float = 0.0
    publish_blocks_per_s: float = 0.0
    main: Timing | None = None
    by_tokens: dict[int, Timing] = {}
    by_workers: dict[int, Timing] = {}
    by_blocks: dict[int, Timing] = {}
    equal_prompts: dict[str, Timing] = {}
    deadlines: Deadlines | None = None


def show(name: str, timing: Timing) -> None:
    print(
        f"{name:<34} Match p50 {timing.match_p50_us:6.0f} p99 {timing.match_p99_us:6.0f} us   "
        f"PING p50 {timing.ping_p50_us:5.0f} p99 {timing.ping_p99_us:6.0f} us   "
        f"ratios {timing.p50_ratio:4.1f} / {timing.p99_ratio:5.1f}",
        flush=True,
    )


def chains_of(num_blocks: int, rng: random.Random) -> list[list[bytes]]:
    return [new_chain(rng, PROMPT_BLOCKS) for _ in range(max(1, num_blocks // PROMPT_BLOCKS))]


async def measure_prompts(
    world: World, chains: list[list[bytes]], num_blocks: int, rng: random.Random, seconds: float
) -> Timing:
    next_prompt = partial(some_prompt, chains, num_blocks, rng)
    await measure(world, next_prompt, rate=RATE, seconds=0.5)  # connections, first-time costs
    return await measure(world, next_prompt, rate=RATE, seconds=seconds)


async def bench_full(options: Options, figures: Figures, rng: random.Random) -> None:
    """Everything that is measured with all blocks stored."""
    async with running_world() as world:
        empty_bytes = await used_bytes(world.registry)
        chains = chains_of(options.stored_blocks, rng)
        num_changes, seconds = await publish_trees(world, chains, WORKERS, rng)
        num_keys = int(await world.registry.link.command("DBSIZE"))
        figures.publish_blocks_per_s = num_changes / seconds
        figures.bytes_per_block = (await used_bytes(world.registry) - empty_bytes) / num_keys
        print(
            f"{num_keys:,} keys of {WORKERS} workers, {figures.bytes_per_block:.0f} bytes each; "
            f"published at {figures.publish_blocks_per_s:,.0f} blocks/s flat out",
            flush=True,
        )
        gc.collect()
        gc.freeze()  # a gateway doesn't hold the prompts of the whole cluster
        figures.main = await measure_prompts(world, chains, PROMPT_BLOCKS, rng, options.seconds)
        show(f"{PROMPT_BLOCKS * BLOCK_TOKENS} tokens", figures.main)
        figures.by_blocks[options.stored_blocks] = figures.main
        figures.equal_prompts["near cache"] = await measure_equal(world, chains[0])
        show("one prompt again and again", figures.equal_prompts["near cache"])
        figures.saturated_lookups_per_s = await saturate(world, chains, rng)
        print(f"{SATURATING} look-ups always under way: {figures.saturated_lookups_per_s:,.0f} per second")
        figures.deadlines = await bench_deadlines(
            world, lambda: some_prompt(chains, PROMPT_BLOCKS, rng), rate=RATE, seconds=options.seconds
        )


async def saturate(world: World, chains: list[list[bytes]], rng: random.Random) -> float:
    """Look-ups per second of one replica when it never has nothing to do."""
    prompts = [some_prompt(chains, PROMPT_BLOCKS, rng) for _ in range(4_000)]

    async def ask(mine: list[list[bytes]]) -> None:
        for prompt in mine:
            await world.client.lookup(prompt)

    start = time.perf_counter()
    await asyncio.gather(*(ask(prompts[number::SATURATING]) for number in range(SATURATING)))
    return len(prompts) / (time.perf_counter() - start)


async def measure_equal(world: World, chain: list[bytes]) -> Timing:
    return await measure(world, lambda: chain, rate=RATE, seconds=3.0)


async def bench_lengths(figures: Figures, rng: random.Random) -> None:
    async with running_world() as world:
        chains = [new_chain(rng, max(LENGTHS)) for _ in range(NUM_LONG_CHAINS)]
        await publish_trees(world, chains, WORKERS, rng)
        for num_blocks in LENGTHS:
            timing = await measure_prompts(world, chains, num_blocks, rng, 3.0)
            figures.by_tokens[num_blocks * BLOCK_TOKENS] = timing
            show(f"{num_blocks * BLOCK_TOKENS} tokens", timing)


async def bench_size(num_workers: int, num_blocks: int, rng: random.Random) -> Timing:
    async with running_world() as world:
        chains = chains_of(num_blocks, rng)
        await publish_trees(world, chains, num_workers, rng)
        timing = await measure_prompts(world, chains, PROMPT_BLOCKS, rng, 3.0)
        show(f"{num_workers} workers, {num_blocks} blocks", timing)
        return timing


async def bench_without_near_cache(figures: Figures, rng: random.Random) -> None:
    async with running_world("--near-cache-ttl-s", "0") as world:
        chains = chains_of(10_000, rng)
        await publish_trees(world, chains, WORKERS, rng)
        figures.equal_prompts["no near cache"] = await measure_equal(world, chains[0])
        show("the same without near cache", figures.equal_prompts["no near cache"])


async def bench(options: Options) -> Figures:
    rng = random.Random(0)
    figures = Figures()
    await bench_full(options, figures, rng)
    await bench_without_near_cache(figures, rng)
    await bench_lengths(figures, rng)
    for num_blocks in (10_000, 100_000):
        figures.by_blocks[num_blocks] = await bench_size(WORKERS, num_blocks, rng)
    figures.by_workers[WORKERS] = figures.by_blocks[100_000]
    for num_workers in (8, 256, 1024):
        figures.by_workers[num_workers] = await bench_size(num_workers, 100_000, rng)
    return figures


def bars_of(figures: Figures) -> list[Bar]:
    main, deadlines = figures.main, figures.deadlines
    assert main is not None and deadlines is not None
    confirmed_rate = deadlines.published.confirmed / deadlines.published.seconds
    return [
        Bar("Match p50 / PING p50", main.p50_ratio, "x", MAX_P50_RATIO),
        Bar("Match p99 / PING p50", main.p99_ratio, "x", MAX_P99_RATIO),
        Bar("bytes per block, 64 workers", figures.bytes_per_block, "B", MAX_BYTES_PER_BLOCK),
        Bar("look-ups past 5 ms while publishing", deadlines.missed, "", 0),
        Bar("p50, most / fewest workers' cost", _spread(figures.by_workers), "x", MAX_FLAT_RATIO),
        Bar("p50, most / fewest blocks' cost", _spread(figures.by_blocks), "x", MAX_FLAT_RATIO),
        Bar("blocks/s published by 8 workers", confirmed_rate, "", 0.99 * PUBLISH_RATE, ">="),
    ]


def _spread(points: dict[int, Timing]) -> float:
    ratios = [timing.p50_ratio for timing in points.values()]
    return max(ratios) / min(ratios)


def write(figures: Figures, directory: Path) -> None:
    from benchmarks.index.plot import plot  # matplotlib is of the extra `bench`

    directory.mkdir(parents=True, exist_ok=True)
    text = msgspec.json.format(msgspec.json.encode(figures), indent=1)
    (directory / "index.json").write_bytes(text + b"\n")
    curves = {
        "prompt tokens": figures.by_tokens,
        "workers": figures.by_workers,
        "stored blocks": figures.by_blocks,
    }
    plot(curves, directory / "index.png", f"Prefix look-ups at {RATE:.0f}/s; 8,192 tokens unless said")


def run(options: Options, bench_all: Callable[[Options], Figures]) -> int:
    figures = bench_all(options)
    print()
    bars = bars_of(figures)
    print("\n".join(bar_lines(bars)))
    if options.output is not None:
        write(figures, options.output)
    return int(options.check and not all_met(bars))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stored-blocks", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path)
    options = Options(**vars(parser.parse_args()))
    sys.exit(run(options, lambda chosen: uvloop.run(bench(chosen))))


if __name__ == "__main__":
    main()

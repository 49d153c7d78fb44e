"""Look-ups at a fixed rate, whatever happened to the ones before, with a bare PING between any two."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable

import msgspec

from benchmarks.index.world import World, new_chain
from phloem.shared.discovery.redis_link import RedisLink


class Timing(msgspec.Struct, frozen=True):
    """Microseconds; `late_us` is how late the benchmark itself was at the 99th percentile."""

    num_calls: int
    match_p50_us: float
    match_p99_us: float
    match_max_us: float
    ping_p50_us: float
    ping_p99_us: float
    late_us: float

    @property
    def p50_ratio(self) -> float:
        return self.match_p50_us / self.ping_p50_us

    @property
    def p99_ratio(self) -> float:
        """The 99th percentile of look-ups against the *median* of PING."""
        return self.match_p99_us / self.ping_p50_us


def some_prompt(chains: list[list[bytes]], num_blocks: int, rng: random.Random) -> list[bytes]:
    """A random part of a stored conversation, and then new text: what a chat's next turn looks like."""
    stored = rng.choice(chains)[: rng.randint(0, num_blocks)]
    return stored + new_chain(rng, num_blocks - len(stored))


class Barrage:
    """Starts a call every `1 / rate` seconds, each in a task of its own, and remembers how long it took."""

    def __init__(self, call: Callable[[], Awaitable[object]], start_at: float, period_s: float) -> None:
        self._call = call
        self._start_at = start_at
        self._period_s = period_s
        self.durations: list[float] = []
        self.lateness: list[float] = []

    async def run(self, num_calls: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(num_calls):
                due = self._start_at + number * self._period_s
                await asyncio.sleep(due - time.perf_counter())
                self.lateness.append(time.perf_counter() - due)
                tasks.create_task(self._one())

    async def _one(self) -> None:
        start = time.perf_counter()
        await self._call()
        self.durations.append(time.perf_counter() - start)


async def measure(
    world: World, next_prompt: Callable[[], list[bytes]], *, rate: float, seconds: float
) -> Timing:
    """`rate` look-ups per second for `seconds`, as many PINGs half a period later."""
    num_calls = round(rate * seconds)
    prompts = [next_prompt() for _ in range(num_calls)]
    remaining = iter(prompts)
    start_at = time.perf_counter() + 0.05
    period_s = 1.0 / rate
    link = RedisLink(world.registry.link.display_url, timeout_s=world.registry.link.timeout_s)
    lookups = Barrage(lambda: world.client.lookup(next(remaining)), start_at, period_s)
    pings = Barrage(lambda: link.command("PING"), start_at + period_s / 2, period_s)
    await link.command("PING")
    await asyncio.gather(lookups.run(num_calls), pings.run(num_calls))
    await link.close()
    match_cuts = statistics.quantiles(lookups.durations, n=100)
    ping_cuts = statistics.quantiles(pings.durations, n=100)
    return Timing(
        num_calls,
        match_cuts[49] * 1e6,
        match_cuts[98] * 1e6,
        max(lookups.durations) * 1e6,
        ping_cuts[49] * 1e6,
        ping_cuts[98] * 1e6,
        statistics.quantiles(lookups.lateness, n=100)[98] * 1e6,
    )

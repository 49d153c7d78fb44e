"""What transfers cost those who wait and those who compute, with whole engines and random prompts.

Exposed transfer is told twice. By the prefill engine: from when it knew token 0 to when the decode engine's
word came that the request is admitted. And as a client sees it: what lies between token 0 and token 1 beyond
a steady step.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Sequence

import msgspec

from phloem.shared.bench.statistics import Summary, summarize
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import SamplingParams
from phloem.shared.transfer_bench.engine_client import EngineClient
from phloem.shared.transfer_bench.lab import HandOver, hand_over

_NEW_TOKENS = 24
_WAIT_S = 120.0


class Exposed(msgspec.Struct, frozen=True, kw_only=True):
    """Hand-overs of one length, one at a time. Milliseconds."""

    prompt_tokens: int
    num_bytes: int
    prefill_ms: Summary
    first_gap_ms: Summary
    step_ms: float
    beyond_step_ms: Summary
    exposed_ms: Summary


class SlowDown(msgspec.Struct, frozen=True, kw_only=True):
    """The same work without and with transfers, in turns of one run; `ratios` are of neighbouring turns."""

    what: str
    without_ms: float
    with_ms: float
    ratios: list[float]
    transfer_gb_per_s: float = 0.0

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


class Prompts:
    """Prompts that share nothing, so that nothing is cached; request ids that come once."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        self._vocabulary = vocabulary
        self._rng = random.Random(seed)
        self._count = 0

    def name(self) -> str:
        self._count += 1
        return f"bench-{self._count}"

    def make(self, length: int) -> list[int]:
        return [self._rng.randrange(2, self._vocabulary) for _ in range(length)]


async def measure_exposed(
    prefill: EngineClient, decode: EngineClient, prompts: Prompts, length: int, count: int
) -> Exposed:
    """`count` hand-overs of `length` tokens after one that is not counted."""
    handed = [await _timed_hand_over(prefill, decode, prompts, length) for _ in range(count + 1)][1:]
    exposed_s = (await prefill.audit()).exposed_transfer_s[-count:]
    steps = [_later_gap_ms(pair) for _, pair in handed]
    gaps = [_gap_ms(pair) for _, pair in handed]
    pages = -(-length // decode.ready.page_size)
    return Exposed(
        prompt_tokens=length,
        num_bytes=pages * decode.ready.page_size * decode.ready.kv_bytes_per_token,
        prefill_ms=_sum([1e3 * (pair.prefill.token_times_s[0] - begun_s) for begun_s, pair in handed]),
        first_gap_ms=_sum(gaps),
        step_ms=statistics.median(steps),
        beyond_step_ms=_sum([gap - step for gap, step in zip(gaps, steps, strict=True)]),
        exposed_ms=_sum([1e3 * seconds for seconds in exposed_s]),
    )


async def measure_prefill_slow_down(
    prefill: EngineClient, decode: EngineClient, prompts: Prompts, length: int, *, batch: int, rounds: int
) -> SlowDown:
    """Prompts queue at the prefill engine; while one is computed, the one before is sent, or nothing is."""
    plain: list[float] = []
    sending: list[float] = []
    await _prefill_batch(prefill, decode, prompts, length, 2)
    before_bytes, began_s = (await prefill.audit()).counters["bytes_sent"], 0.0
    for number in range(rounds):
        for with_transfer in (False, True) if number % 2 == 0 else (True, False):
            peer = decode if with_transfer else None
            took_s = await _prefill_batch(prefill, peer, prompts, length, batch)
            (sending if with_transfer else plain).append(1e3 * took_s / batch)
            began_s += took_s if with_transfer else 0.0
    num_bytes = (await prefill.audit()).counters["bytes_sent"] - before_bytes
    return SlowDown(
        what=f"prefill of {length} tokens",
        without_ms=statistics.median(plain),
        with_ms=statistics.median(sending),
        ratios=[b / a for a, b in zip(plain, sending, strict=True)],
        transfer_gb_per_s=num_bytes / 1e9 / began_s,
    )


async def measure_decode_slow_down(
    prefill: EngineClient,
    decode: EngineClient,
    prompts: Prompts,
    *,
    running: int,
    context: int,
    length: int,
    window_s: float,
    rounds: int,
) -> tuple[SlowDown, SlowDown]:
    """Median and p99 of the steps of `running` requests at the decode engine, with and without hand-overs of
    `length` tokens that follow one another."""
    sampling = SamplingParams(max_tokens=1_000_000, temperature=0.0, ignore_eos=True)
    names = [prompts.name() for _ in range(running)]
    streams = [await decode.submit(name, prompts.make(context), sampling) for name in names]
    for stream in streams:
        await stream.until_tokens(8, _WAIT_S)
    medians: dict[bool, list[float]] = {False: [], True: []}
    tails: dict[bool, list[float]] = {False: [], True: []}
    num_bytes = (await decode.audit()).counters["bytes_received"]
    for number in range(rounds):
        for with_transfer in (False, True) if number % 2 == 0 else (True, False):
            since_s = time.monotonic()
            if with_transfer:
                await _hand_over_for(window_s, prefill, decode, prompts, length)
            else:
                await asyncio.sleep(window_s)
            steps = _sum(_gaps_since(streams[0].token_times_s, since_s))
            medians[with_transfer].append(steps.median)
            tails[with_transfer].append(steps.p99)
    num_bytes = (await decode.audit()).counters["bytes_received"] - num_bytes
    for name in names:
        await decode.abort(name)
    for stream in streams:
        await stream.until_end(_WAIT_S)
    rate = num_bytes / 1e9 / (window_s * rounds)
    what = f"decode step, {running} running"
    return _slow_down(f"{what}, median", medians, rate), _slow_down(f"{what}, p99", tails, rate)


# -- inside ------------------------------------------------------------------------------------------------


async def _timed_hand_over(
    prefill: EngineClient, decode: EngineClient, prompts: Prompts, length: int
) -> tuple[float, HandOver]:
    sampling = SamplingParams(max_tokens=_NEW_TOKENS, temperature=0.0, ignore_eos=True)
    name, prompt = prompts.name(), prompts.make(length)
    begun_s = time.monotonic()
    pair = await hand_over(prefill, decode, name, prompt, sampling)
    await pair.completed()
    return begun_s, pair


async def _prefill_batch(
    prefill: EngineClient, decode: EngineClient | None, prompts: Prompts, length: int, batch: int
) -> float:
    """Seconds from the first submission to the last token 0. Ends when all transfers have ended."""
    one = SamplingParams(max_tokens=1 if decode is None else 2, temperature=0.0, ignore_eos=True)
    made = [(prompts.name(), prompts.make(length)) for _ in range(batch)]
    begun_s = time.monotonic()
    if decode is None:
        streams = [await prefill.submit(name, prompt, one) for name, prompt in made]
    else:
        pairs = [await hand_over(prefill, decode, name, prompt, one) for name, prompt in made]
        streams = [pair.prefill for pair in pairs]
    for stream in streams:
        await stream.until_tokens(1, _WAIT_S)
    took_s = max(stream.token_times_s[0] for stream in streams) - begun_s
    if decode is not None:
        for pair in pairs:
            await pair.completed()
    return took_s


async def _hand_over_for(
    window_s: float, prefill: EngineClient, decode: EngineClient, prompts: Prompts, length: int
) -> None:
    """Two hand-overs at a time for so long: one computes while the other is sent."""
    until_s = time.monotonic() + window_s
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)

    async def one_after_another() -> None:
        while time.monotonic() < until_s:
            pair = await hand_over(prefill, decode, prompts.name(), prompts.make(length), sampling)
            await pair.completed()

    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(one_after_another())


def _gap_ms(pair: HandOver) -> float:
    return 1e3 * (pair.decode.token_times_s[0] - pair.prefill.token_times_s[0])


def _later_gap_ms(pair: HandOver) -> float:
    """The median step once the request runs; its first two are left out."""
    return 1e3 * statistics.median(_gaps(pair.decode.token_times_s[2:]))


def _gaps(times_s: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times_s)]


def _gaps_since(times_s: Sequence[float], since_s: float) -> list[float]:
    return [1e3 * gap for gap in _gaps([at_s for at_s in times_s if at_s >= since_s])]


def _slow_down(what: str, values: dict[bool, list[float]], gb_per_s: float) -> SlowDown:
    return SlowDown(
        what=what,
        without_ms=statistics.median(values[False]),
        with_ms=statistics.median(values[True]),
        ratios=[b / a for a, b in zip(values[False], values[True], strict=True)],
        transfer_gb_per_s=gb_per_s,
    )


def _sum(values: Sequence[float]) -> Summary:
    summary = summarize(values)
    if summary is None:
        raise PhloemError("bench_failed", "nothing was measured: the engine made no step in time")
    return summary

"""The whole of `phloem bench transfer`: bandwidth, exposed transfer, slow-downs, and their bars."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec

from phloem.shared.bench.bars import Bar, all_met
from phloem.shared.engine.config import EngineOptions
from phloem.shared.errors import ConfigError
from phloem.shared.model_store.model_config import ModelConfig, load_model_config
from phloem.shared.transfer_bench.bandwidth import (
    BandwidthPlan,
    BandwidthReport,
    measure_bandwidth,
)
from phloem.shared.transfer_bench.exposure import (
    Exposed,
    Prompts,
    SlowDown,
    measure_decode_slow_down,
    measure_exposed,
    measure_prefill_slow_down,
)
from phloem.shared.transfer_bench.lab import open_lab, prove_channel
from phloem.shared.transfer_bench.rank_protocol import KvShape

JUDGED_BYTES = 256 * 2**20
JUDGED_PROMPT = 8192
MIN_RATIO = 0.9
MAX_EXPOSED_MS = 6.0
MAX_PREFILL_SLOW_DOWN = 1.03
MAX_DECODE_SLOW_DOWN = 1.25

Tell = Callable[[str], None]


class TransferOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. `gpus` are the host's numbers of the prefill and the decode GPU; none: CPU processes.

    `model_dir` needs a config.json only. Empty `sizes` leave bandwidth out, empty `prompts` the engines.
    Slow-downs are measured with the last of `prompts`, the decode side with `running` requests of `context`
    tokens.
    """

    model_dir: str
    dtype: str
    gpus: tuple[int, int] | None
    sizes: tuple[int, ...]
    prompts: tuple[int, ...]
    context_length: int = 0
    hand_overs: int = 8
    rounds: int = 5
    batch: int = 6
    running: int = 32
    context: int = 1024
    window_s: float = 3.0
    staging_bytes: int = 0
    staging_slots: int = 0
    max_ctas: int = 0
    ahead_bytes: int = 2**31
    log_dir: str


class TransferReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was found; `bars` are judged on GPUs only."""

    options: TransferOptions
    bandwidth: BandwidthReport | None
    exposed: list[Exposed]
    slow_downs: list[SlowDown]
    bars: list[Bar]

    @property
    def holds(self) -> bool:
        return all_met(self.bars)


def run_transfer_bench(options: TransferOptions, tell: Tell) -> TransferReport:
    """Must be called on the main thread. Raises `PhloemError` when something breaks, or arrives altered."""
    config = load_model_config(Path(options.model_dir))
    bandwidth = _bandwidth(options, config, tell) if options.sizes else None
    exposed: list[Exposed] = []
    slow_downs: list[SlowDown] = []
    if options.prompts:
        exposed, slow_downs = asyncio.run(_engines(options, config, tell))
    bars = bars_of(bandwidth, exposed, slow_downs, judged=options.gpus is not None)
    return TransferReport(
        options=options, bandwidth=bandwidth, exposed=exposed, slow_downs=slow_downs, bars=bars
    )


def bars_of(
    bandwidth: BandwidthReport | None, exposed: list[Exposed], slow_downs: list[SlowDown], *, judged: bool
) -> list[Bar]:
    """Issue 4's bars; without `judged` the same figures without bounds."""
    return [*_bandwidth_bars(bandwidth, judged), *_engine_bars(exposed, slow_downs, judged)]


def _bandwidth(options: TransferOptions, config: ModelConfig, tell: Tell) -> BandwidthReport:
    plan = BandwidthPlan(
        sizes=options.sizes,
        shape=KvShape(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=options.dtype,
        ),
        gpus=options.gpus,
        staging_bytes=options.staging_bytes,
        staging_slots=options.staging_slots,
        max_ctas=options.max_ctas,
        rounds=options.rounds,
        ahead_bytes=options.ahead_bytes,
        log=Path(options.log_dir) / "ranks.log",
    )
    return measure_bandwidth(plan, lambda text: tell(f"bandwidth: {text}"))


async def _engines(
    options: TransferOptions, config: ModelConfig, tell: Tell
) -> tuple[list[Exposed], list[SlowDown]]:
    async with open_lab(_engine_options(options), Path(options.log_dir)) as lab:
        tell("starting a prefill and a decode engine")
        gpus = options.gpus or (None, None)
        prefill, decode = await asyncio.gather(lab.start("prefill", gpus[0]), lab.start("decode", gpus[1]))
        await prefill.peer_up(decode)
        await prove_channel(prefill, decode, "first")
        prompts = Prompts(config.vocab_size)
        exposed = []
        for length in options.prompts:
            tell(f"exposed transfer: {length} tokens")
            exposed.append(await measure_exposed(prefill, decode, prompts, length, options.hand_overs))
        tell("prefill, with and without sending")
        length = options.prompts[-1]
        slow_prefill = await measure_prefill_slow_down(
            prefill, decode, prompts, length, batch=options.batch, rounds=options.rounds
        )
        tell("decode, with and without receiving")
        slow_decode = await measure_decode_slow_down(
            prefill,
            decode,
            prompts,
            running=options.running,
            context=options.context,
            length=length,
            window_s=options.window_s,
            rounds=max(2, options.rounds // 2),
        )
        for engine in (prefill, decode):
            await engine.audit_idle()
        return exposed, [slow_prefill, *slow_decode]


def _engine_options(options: TransferOptions) -> EngineOptions:
    chosen = {name: value for name in ("staging_bytes", "staging_slots") if (value := getattr(options, name))}
    return msgspec.convert(
        {
            "model_path": options.model_dir,
            "load_format": "dummy",
            "dtype": options.dtype,
            "context_length": options.context_length,
            **chosen,
        },
        EngineOptions,
    )


def _bandwidth_bars(report: BandwidthReport | None, judged: bool) -> list[Bar]:
    """One bar per size of at least `JUDGED_BYTES`: one request's pages beside one message in one piece."""
    sizes = report.sizes if report is not None else []
    return [
        Bar(
            f"paged KV / raw, {size.num_bytes / 2**20:.0f} MiB",
            size.ratio,
            "x",
            MIN_RATIO if judged else None,
            ">=",
        )
        for size in sizes
        if size.ratio is not None and (size.num_bytes >= JUDGED_BYTES or not judged)
    ]


def _engine_bars(exposed: list[Exposed], slow_downs: list[SlowDown], judged: bool) -> list[Bar]:
    bars = [
        Bar(
            f"exposed transfer, {item.prompt_tokens} tokens, {name}",
            value,
            "ms",
            MAX_EXPOSED_MS if judged and item.prompt_tokens == JUDGED_PROMPT else None,
        )
        for item in exposed
        for name, value in (("median", item.exposed_ms.median), ("max", item.exposed_ms.max))
    ]
    bounds = {"prefill": MAX_PREFILL_SLOW_DOWN, "p99": MAX_DECODE_SLOW_DOWN}
    for slow in slow_downs:
        bound = next((value for word, value in bounds.items() if word in slow.what), None)
        bars.append(Bar(f"{slow.what}: slow-down", slow.ratio, "x", bound if judged else None))
    return bars


def parse_sizes(text: str) -> tuple[int, ...]:
    """Bytes from "1,16,256" MiB. Raises `ConfigError`."""
    try:
        sizes = tuple(int(item) * 2**20 for item in text.split(",") if item.strip())
    except ValueError:
        sizes = (0,)
    if any(size <= 0 for size in sizes):
        raise ConfigError(f"{text!r} is no list of sizes: give MiB with commas, as in 1,16,256")
    return sizes

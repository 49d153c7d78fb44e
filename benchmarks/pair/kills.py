"""Fifty peers that are killed in mid-transfer, and what the survivors have to keep."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable

from benchmarks.pair.setting import TRANSFER_TIMEOUT_S, Setting
from phloem.shared.bench.bars import Bar
from phloem.shared.protocol.cluster import Role
from phloem.shared.transfer_bench.engine_client import EngineClient
from phloem.shared.transfer_bench.lab import Lab
from phloem.shared.transfer_bench.loss_peers import PeerPlan
from phloem.shared.transfer_bench.losses import LossPlan, LossRun
from phloem.shared.transfer_bench.memory import gpu_used_mib, growth_mib, resident_mib

MAX_NEXT_REQUEST_S = 2.0
MAX_GROWTH_MIB = 64.0
MIN_SAMPLES = 4  # of memory: fewer say nothing of growth
# A layer of a page has 64 KiB: small slots make a transfer last long enough to be interrupted.
_SLOW_STAGING = ((65_536, 1), (131_072, 1))


async def lose_peers(setting: Setting, lab: Lab, *, kills: int, freezes: int) -> list[Bar]:
    """Half of the losses is survived by a decode engine, then half by a prefill engine; both run from the
    start, so that what one of them takes of the GPU is constant while the other one is looked at."""
    first = _loss_run(setting, lab, "decode", kills - kills // 2, freezes - freezes // 2)
    second = _loss_run(setting, lab, "prefill", kills // 2, freezes // 2)
    runs = [run for run in (first, second) if run.plan.count]
    began_s = time.monotonic()
    try:
        runs[0].start_ahead()
        await asyncio.gather(*(run.prepare() for run in runs))
        print(f"survivors serve after {time.monotonic() - began_s:.0f} s", flush=True)
        for run, after in zip(runs, [*runs[1:], None], strict=True):
            plan = run.plan
            print(f"a {plan.survivor} engine survives {plan.kills} kills and {plan.freezes} freezes")
            await (run.run(after.start_beside) if after is not None else run.run())
    finally:
        for run in runs:
            await run.close()
        print(f"after {time.monotonic() - began_s:.0f} s", *_loss_lines(runs), sep="\n  ", flush=True)
    return _loss_bars(runs)


def _loss_run(setting: Setting, lab: Lab, survivor: Role, kills: int, freezes: int) -> LossRun:
    plan = _loss_plan(setting, survivor, kills, freezes)
    return LossRun(lab, plan, _memory_of(setting), _tell)


def _loss_plan(setting: Setting, survivor: Role, kills: int, freezes: int) -> LossPlan:
    """Survivors have the second GPU to themselves: its memory is theirs."""
    cuda = setting.gpus is not None
    peers = PeerPlan(
        role="prefill" if survivor == "decode" else "decode",
        gpu=setting.gpu("prefill"),
        staging=_SLOW_STAGING if cuda else ((65_536, 1),),
        num_ahead=10 if cuda else 2,
    )
    return LossPlan(
        kills=kills,
        freezes=freezes,
        survivor=survivor,
        survivor_gpu=setting.gpu("decode"),
        peers=peers,
        prompt_tokens=8000 if cuda else 1000,
        vocabulary=setting.vocabulary,
        killed_within_s=2.0,
        frozen_within_s=TRANSFER_TIMEOUT_S + 1.5,
        memory_every=3 if kills >= 20 else 1,
    )


def _memory_of(setting: Setting) -> Callable[[EngineClient], float]:
    """Of the survivors' whole GPU: nobody else is on it, and only one of them is busy at a time."""
    gpu = setting.gpu("decode")
    return (lambda engine: resident_mib(engine.pid)) if gpu is None else (lambda engine: gpu_used_mib(gpu))


def _loss_lines(runs: list[LossRun]) -> list[str]:
    return [
        f"{run.plan.survivor} survives: {len(run.losses)} losses in {run.num_tries} tries; next request "
        f"{_spread([loss.next_request_s for loss in run.losses])} s; noticed "
        f"{_spread([loss.noticed_s for loss in run.losses])} s; memory {_spread(run.memories_mib)} MiB"
        for run in runs
    ]


def _spread(values: list[float]) -> str:
    """Lowest, median and highest."""
    if not values:
        return "-"
    return f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f}"


def _loss_bars(runs: list[LossRun]) -> list[Bar]:
    losses = [loss for run in runs for loss in run.losses]
    wanted = sum(run.plan.count for run in runs)
    nan = float("nan")
    is_judged = min((len(run.memories_mib) for run in runs), default=0) >= MIN_SAMPLES
    return [
        Bar("peers lost in mid-transfer, all answered rightly, audits clean", len(losses), "", wanted, ">="),
        Bar(
            "next request's first token at the survivor, slowest",
            max((loss.next_request_s for loss in losses), default=nan),
            "s",
            MAX_NEXT_REQUEST_S,
        ),
        Bar(
            "loss noticed by the survivor, slowest",
            max((loss.noticed_s for loss in losses), default=nan),
            "s",
        ),
        Bar(
            "survivor's memory, growth over a run",
            max((growth_mib(run.memories_mib) for run in runs), default=nan),
            "MiB",
            MAX_GROWTH_MIB if is_judged else None,
        ),
    ]


def _tell(text: str) -> None:
    print(f"  {text}", flush=True)

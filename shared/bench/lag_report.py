"""Whether the client was fast enough for its own figures."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import msgspec

from phloem.shared.bench.protocol import LagSamples
from phloem.shared.bench.statistics import Summary, summarize

# The event loop's timers have a grain of a millisecond: less can't be told from it.
_FLOOR_MS = 2.0
_SHARE_OF_ITL = 0.2


class LagReport(msgspec.Struct, frozen=True, kw_only=True):
    """The client's lateness in milliseconds over a run, and the verdict.

    `loop`: of timers; `spans`: of the last of the reads that came together; `dispatch`: of requests behind
    the open loop's schedule. `cpu_share` is the busiest client process's share of one core,
    `priority` how it was scheduled. `is_spoiled`
    when the 99th percentile of one of them is over `limit_ms`.
    """

    limit_ms: float
    loop: Summary | None
    spans: Summary | None
    dispatch: Summary | None
    cpu_share: float
    priority: str
    is_spoiled: bool
    reason: str = ""


def judge_lag(
    samples: Sequence[LagSamples], *, limit_ms: float | None, median_chunk_itl_ms: float | None
) -> LagReport:
    """The report over all client processes and blocks.

    Without a limit of the user's it is a fifth of the median gap between chunks that was measured, and at
    least 2 ms: a 99th percentile of the client's that is above would colour that of the server.
    """
    if limit_ms is None:
        limit_ms = max(_FLOOR_MS, _SHARE_OF_ITL * (median_chunk_itl_ms or 0.0))
    kinds = {
        "event loop": summarize(_milliseconds(samples, "loop")),
        "reading": summarize(_milliseconds(samples, "spans")),
        "sending": summarize(_milliseconds(samples, "dispatch")),
    }
    late = [
        f"{name} {summary.p99:.1f} ms"
        for name, summary in kinds.items()
        if summary is not None and summary.p99 > limit_ms
    ]
    reason = (
        f"the client itself was late (p99 of {', '.join(late)}; limit {limit_ms:.1f} ms): its figures are "
        "not the server's. Free a core for it, give it --clients 2, or lower the load"
    )
    return LagReport(
        limit_ms=limit_ms,
        loop=kinds["event loop"],
        spans=kinds["reading"],
        dispatch=kinds["sending"],
        cpu_share=max((sample.cpu_s / sample.wall_s for sample in samples if sample.wall_s > 0), default=0.0),
        priority=next((sample.priority for sample in samples), ""),
        is_spoiled=bool(late),
        reason=reason if late else "",
    )


def _milliseconds(samples: Sequence[LagSamples], field: str) -> list[float]:
    return [seconds * 1e3 for sample in samples for seconds in array("d", getattr(sample, field))]

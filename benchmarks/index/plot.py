"""The curves as one PNG: what a look-up costs, in PINGs of the same run, over what could make it slower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

from benchmarks.index.lookups import Timing


def plot(curves: Mapping[str, Mapping[int, Timing]], path: Path, title: str) -> None:
    """A panel per curve; x is its key, y the ratios to PING's median."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.6), sharey=True)
    for panel, (name, points) in zip(panels, curves.items(), strict=True):
        xs = sorted(points)
        panel.plot(xs, [points[x].p50_ratio for x in xs], "o-", label="p50")
        panel.plot(xs, [points[x].p99_ratio for x in xs], "s--", label="p99")
        panel.set_xscale("log", base=2 if name == "workers" else 10)
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("Match / median PING")
    dearest = max(timing.p99_ratio for points in curves.values() for timing in points.values())
    panels[0].set_ylim(0, 1.05 * dearest)  # for all: they share it
    panels[0].legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

"""The charts as a PNG, with matplotlib (extra `bench`)."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from phloem.shared.bench.plot_data import Chart, charts_of
from phloem.shared.bench.result import RunResult

_COLUMNS = 2
_WIDTH_INCHES = 12.0
_ROW_INCHES = 3.4


def render_png(result: RunResult, path: Path) -> None:
    """All charts in one picture."""
    charts = charts_of(result)
    rows = max(-(-len(charts) // _COLUMNS), 1)
    figure = Figure(figsize=(_WIDTH_INCHES, rows * _ROW_INCHES), layout="constrained")
    for index, chart in enumerate(charts):
        _draw(figure.add_subplot(rows, _COLUMNS, index + 1), chart)
    figure.savefig(str(path), format="png")


def _draw(axes: Axes, chart: Chart) -> None:
    for curve in chart.curves:
        style = {"linestyle": "none", "marker": ".", "markersize": 3} if curve.dots else {"linewidth": 1.5}
        axes.plot(curve.xs, curve.ys, label=curve.name, **style)
    if chart.is_x_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")

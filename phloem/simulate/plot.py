"""The TTFTs of several runs as one SVG file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from phloem.shared.bench.plot_data import Chart, Curve, cdf_points
from phloem.shared.bench.plot_html import COLORS, chart_svg
from phloem.shared.errors import ConfigError
from phloem.simulate.result import SimulationResult

_WIDTH, _HEIGHT, _GAP = 560, 300, 8
_TOP, _LEGEND_WIDTH = 30, 130
_LEAST_MS = 1.0
_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#4b5563}"
    ".t{font-size:13px;font-weight:600;fill:#111827}.g{stroke:#e5e7eb}"
)


def check_plot_path(path: Path) -> None:
    """Raises `ConfigError` for a kind of file that can't be made: before the run, not after it."""
    if path.suffix != ".svg":
        raise ConfigError(f"--plot {path}: the name must end in .svg")


def write_plot(results: Sequence[SimulationResult], title: str, path: Path) -> None:
    """Distributions of TTFT, whole and its slowest tenth. Raises `ConfigError` when it can't be written."""
    check_plot_path(path)
    try:
        path.write_text(render(results, title), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"can't write {path}: {error.strerror}") from error


def render(results: Sequence[SimulationResult], title: str) -> str:
    """The file's text."""
    curves = [_curve(result) for result in results]
    charts = [
        Chart("TTFT", "ms", "share below", True, curves),
        Chart("TTFT of the slowest tenth", "ms", "% slower", True, [_tail(curve) for curve in curves]),
    ]
    height = _HEIGHT + _TOP
    parts = [
        f'<svg x="{n * (_WIDTH + _GAP)}" y="{_TOP}" {chart_svg(chart, legend=False).removeprefix("<svg ")}'
        for n, chart in enumerate(charts)
    ]
    left = len(charts) * (_WIDTH + _GAP)
    parts += [_legend(curve.name, n, left) for n, curve in enumerate(curves)]
    width = left + _LEGEND_WIDTH
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
        f'<style>{_STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>'
        f'<text class="t" x="12" y="20">{escape(title)}</text>{"".join(parts)}</svg>\n'
    )


def _legend(name: str, place: int, left: int) -> str:
    y = _TOP + 40 + 20 * place
    return (
        f'<rect x="{left}" y="{y}" width="9" height="9" fill="{COLORS[place % len(COLORS)]}"/>'
        f'<text x="{left + 14}" y="{y + 9}">{escape(name)}</text>'
    )


def _curve(result: SimulationResult) -> Curve:
    xs, ys = cdf_points([max(ttft_s * 1e3, _LEAST_MS) for ttft_s in result.ttfts_s])
    gateways = result.options.shape.num_gateways
    name = result.options.policy if gateways == 1 else f"{result.options.policy} {gateways}G"
    return Curve(name, xs, ys)


def _tail(curve: Curve) -> Curve:
    first = next((n for n, y in enumerate(curve.ys) if y >= 0.9), 0)
    return Curve(curve.name, curve.xs[first:], [round(100 * (1 - y), 4) for y in curve.ys[first:]])

"""The charts as one HTML file that needs nothing else: inline SVG, no script from anywhere."""

from __future__ import annotations

import math
from html import escape
from typing import NamedTuple

from phloem.shared.bench.plot_data import Chart, Curve, charts_of
from phloem.shared.bench.result import RunResult

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 30, 42
COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2")
_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:24px;color:#1f2937;background:#fff}
h1{font-size:20px;margin:0 0 4px}p{margin:2px 0;color:#4b5563}.bad{color:#b91c1c;font-weight:600}
.charts{display:flex;flex-wrap:wrap;gap:16px;margin:16px 0}svg{border:1px solid #e5e7eb;border-radius:6px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:2px 12px 2px 0;text-align:right}
td:first-child,th:first-child{text-align:left}text{font:11px system-ui,sans-serif;fill:#4b5563}
.t{font-size:13px;font-weight:600;fill:#111827}.g{stroke:#e5e7eb}
"""
_ROWS = (
    ("Successful requests", "completed"),
    ("Failed requests", "failed"),
    ("Output throughput (tok/s)", "output_throughput"),
    ("Median TTFT (ms)", "median_ttft_ms"),
    ("P99 TTFT (ms)", "p99_ttft_ms"),
    ("Median ITL (ms)", "median_itl_ms"),
    ("P99 ITL (ms)", "p99_itl_ms"),
    ("Median ITL per chunk (ms)", "median_chunk_itl_ms"),
    ("P99 ITL per chunk (ms)", "p99_chunk_itl_ms"),
    ("Median E2E latency (ms)", "median_e2e_latency_ms"),
)


class _Axis(NamedTuple):
    """Maps values to pixels, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    def place(self, value: float) -> float:
        low, high, value = (
            (math.log10(self.low), math.log10(self.high), math.log10(max(value, self.low)))
            if self.is_log
            else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.is_log else _linear_ticks(self.low, self.high)


def render_html(result: RunResult) -> str:
    """The whole page."""
    env = result.environment
    problems = "".join(f'<p class="bad">INVALID: {escape(problem)}</p>' for problem in result.problems)
    remarks = "".join(f"<p>note: {escape(remark)}</p>" for remark in result.remarks)
    charts = "".join(chart_svg(chart) for chart in charts_of(result))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>phloem bench</title>'
        f"<style>{_STYLE}</style><h1>phloem bench serve</h1>"
        f"<p>{escape(result.started_at)} &middot; phloem {escape(env.phloem_version)} {escape(env.commit)} "
        f"&middot; {escape(env.cpu)}, {env.usable_cores} cores {escape(', '.join(env.gpus))}</p>"
        f"<p><code>{escape(' '.join(result.command))}</code></p>{problems}{remarks}"
        f'<div class="charts">{charts}</div>{_table(result)}</html>\n'
    )


def _table(result: RunResult) -> str:
    head = "".join(f"<th>{escape(target.name)}</th>" for target in result.targets)
    rows = []
    for label, key in _ROWS:
        cells = [target.figures.get(key) for target in result.targets]
        if any(isinstance(cell, int | float) for cell in cells):
            values = "".join(f"<td>{_number(cell)}</td>" for cell in cells)
            rows.append(f"<tr><td>{escape(label)}</td>{values}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _number(value: float | int | str | None) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else "-"


def chart_svg(chart: Chart, *, legend: bool = True) -> str:
    """One chart; its text and grid lines want the classes of the page's style."""
    x_axis, y_axis = _axes(chart)
    parts = [f'<text class="t" x="{_LEFT}" y="18">{escape(chart.title)}</text>', *_grid(x_axis, y_axis)]
    middle_y = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts += [
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">{escape(chart.x_label)}</text>',
        f'<text transform="translate(12 {middle_y}) rotate(-90)" text-anchor="middle">'
        f"{escape(chart.y_label)}</text>",
    ]
    for index, curve in enumerate(chart.curves):
        color = COLORS[index % len(COLORS)]
        parts.append(
            _dots(curve, x_axis, y_axis, color) if curve.dots else _line(curve, x_axis, y_axis, color)
        )
        if legend:
            parts.append(_legend(curve.name, color, len(chart.curves) - index))
    return f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _axes(chart: Chart) -> tuple[_Axis, _Axis]:
    xs = [x for curve in chart.curves for x in curve.xs]
    ys = [y for curve in chart.curves for y in curve.ys]
    x_low = min(xs) if chart.x_label == "ms" else 0.0
    return (
        _Axis(x_low, max(max(xs), x_low + 1e-6), _LEFT, _WIDTH - _RIGHT, chart.is_x_log),
        _Axis(0.0, max(max(ys) * 1.05, 1e-6), _HEIGHT - _BOTTOM, _TOP, False),
    )


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    parts = []
    for value in x_axis.ticks():
        x = x_axis.place(value)
        parts.append(f'<line class="g" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="middle">{value:g}</text>')
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(f'<line class="g" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    return parts


def _line(curve: Curve, x_axis: _Axis, y_axis: _Axis, color: str) -> str:
    points = " ".join(
        f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in zip(curve.xs, curve.ys, strict=True)
    )
    return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.6"/>'


def _dots(curve: Curve, x_axis: _Axis, y_axis: _Axis, color: str) -> str:
    circles = "".join(
        f'<circle cx="{x_axis.place(x):.1f}" cy="{y_axis.place(y):.1f}" r="1.8"/>'
        for x, y in zip(curve.xs, curve.ys, strict=True)
    )
    return f'<g fill="{color}" fill-opacity="0.55">{circles}</g>'


def _legend(name: str, color: str, place: int) -> str:
    """In the title's row, the `place`-th from the right."""
    x = _WIDTH - _RIGHT - 110 * place
    return (
        f'<rect x="{x}" y="9" width="9" height="9" fill="{color}"/>'
        f'<text x="{x + 14}" y="18">{escape(name[:14])}</text>'
    )


def _linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    rough = (high - low) / wanted
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough)
    first = math.ceil(low / step)
    return [round(number * step, 10) for number in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... over few decades, else 1, 10, 100, ..."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]

"""Plots of a result: which file for which name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from phloem.shared.bench.output_path import check_output_path
from phloem.shared.bench.result import RunResult
from phloem.shared.errors import ConfigError


def check_plot_path(path: Path) -> None:
    """Raises `ConfigError` for a kind of file that can't be made here: before the run, not after it."""
    if path.suffix not in (".html", ".png"):
        raise ConfigError(f"--plot {path}: the name must end in .html or .png")
    if path.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot to a PNG needs matplotlib: pip install 'phloem[bench]', or plot to .html")
    check_output_path(path, "--plot")


def write_plot(result: RunResult, path: Path) -> None:
    """CDFs of the latencies, and the run over time. Raises `ConfigError` when it can't be written."""
    check_plot_path(path)
    try:
        if path.suffix == ".html":
            from phloem.shared.bench.plot_html import render_html

            path.write_text(render_html(result), encoding="utf-8")
        else:
            from phloem.shared.bench.plot_png import render_png

            render_png(result, path)
    except OSError as error:
        raise ConfigError(f"can't write {path}: {error.strerror}") from error

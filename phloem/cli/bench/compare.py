"""`phloem bench compare`: two results side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from phloem.cli.bench.comparison_table import print_comparison
from phloem.shared.bench.comparison import compare_targets
from phloem.shared.bench.result import RunResult, TargetResult, read_result
from phloem.shared.errors import ConfigError


def compare(
    a: Annotated[str, Parameter(help="a result: FILE, or FILE#TARGET where it has several")],
    b: Annotated[str, Parameter(help="the other; its figures are divided by those of the first")],
    /,
    *,
    seed: Annotated[int, Parameter(help="of the resampling")] = 0,
) -> int:
    """Ratios of two results, with 95% bootstrap intervals."""
    results: dict[Path, RunResult] = {}  # two targets of one file are of one run
    first, first_target = _pick(a, results)
    second, second_target = _pick(b, results)
    comparison = compare_targets(first, first_target, second, second_target, seed=seed)
    print_comparison(comparison, Console(highlight=False))
    return 0


def _pick(text: str, results: dict[Path, RunResult]) -> tuple[RunResult, TargetResult]:
    """The result and the target that FILE#TARGET names. Raises `ConfigError`."""
    file, _, name = text.partition("#")
    path = Path(file).resolve()
    if path not in results:
        results[path] = read_result(path)
    result = results[path]
    targets = [target for target in result.targets if not name or target.name == name]
    if len(targets) != 1:
        names = ", ".join(target.name for target in result.targets)
        raise ConfigError(f"{file} has the targets {names}: name one as {file}#NAME")
    return result, targets[0]

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
    first, first_target = _pick(a)
    second, second_target = _pick(b)
    comparison = compare_targets(first, first_target, second, second_target, seed=seed)
    print_comparison(comparison, Console(highlight=False))
    return 0


def _pick(text: str) -> tuple[RunResult, TargetResult]:
    """The result and the target that FILE#TARGET names. Raises `ConfigError`."""
    path, _, name = text.partition("#")
    result = read_result(Path(path))
    targets = [target for target in result.targets if not name or target.name == name]
    if len(targets) != 1:
        names = ", ".join(target.name for target in result.targets)
        raise ConfigError(f"{path} has the targets {names}: name one as {path}#NAME")
    return result, targets[0]

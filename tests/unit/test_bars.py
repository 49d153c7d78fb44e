"""Bars beside their bounds, and the samples that they are made of."""

from __future__ import annotations

import math

import pytest

from benchmarks.samples import Samples
from phloem.shared.bench.bars import Bar, all_met, bar_lines


@pytest.mark.parametrize(
    ("bar", "is_met"),
    [
        (Bar("a", 1.0, "x", 1.0), True),
        (Bar("a", 1.01, "x", 1.0), False),
        (Bar("a", 0.9, "x", 0.9, ">="), True),
        (Bar("a", 0.89, "x", 0.9, ">="), False),
        (Bar("a", math.nan, "x", 1.0), False),
        (Bar("a", math.nan, "x", 1.0, ">="), False),
        (Bar("a", math.nan, "x"), True),
    ],
)
def test_bar_is_met_by_its_bound_and_not_by_a_missing_number(bar: Bar, is_met: bool) -> None:
    assert bar.is_met is is_met
    assert ("MISSED" in bar_lines([bar])[0]) is not is_met
    assert all_met([bar, Bar("told", 5.0)]) is is_met


def test_lines_of_bars_and_samples_are_columns() -> None:
    assert bar_lines([Bar("ratio", 0.5, "x", 0.9, ">="), Bar("longer name", 12.0, "ms")]) == [
        "ratio             0.500 x     >= 0.9     MISSED",
        "longer name      12.000 ms",
    ]
    samples = Samples()
    for value in (3.0, 1.0, 2000.0):
        samples.add("a", value)
    samples.add("longer", 0.25)
    assert samples.median("a") == 3.0
    assert samples.lines() == [
        "a               3.00   (1.00 .. 2,000.00)",
        "longer          0.25   (0.25 .. 0.25)",
    ]

"""How many programs move pages, by what crosses the link meanwhile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phloem.kernels.triton_ops.pages import num_programs

MOST = 99  # of an H200
LINK = 32  # that keep up with the link


@pytest.mark.parametrize(
    ("beside", "programs"),
    [
        (0.0, MOST),  # nothing crosses before the move is over
        (0.1, MOST),
        (0.5, 2 * LINK),  # twice as fast as the link
        (1.0, LINK),
        (7.0, LINK),  # no slower than the link: the next move waits behind this one
    ],
)
def test_move_is_over_when_what_crosses_beside_it_has_crossed(beside: float, programs: int) -> None:
    assert num_programs(MOST, beside) == programs


@given(most=st.integers(1, 200), less=st.floats(0.001, 100.0), more=st.floats(0.001, 100.0))
def test_more_that_crosses_beside_it_never_takes_more_programs(most: int, less: float, more: float) -> None:
    less, more = sorted((less, more))
    assert 1 <= num_programs(most, more) <= num_programs(most, less) <= num_programs(most, 0.0) == most

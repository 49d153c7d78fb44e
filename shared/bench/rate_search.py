"""The search for the highest rate that holds: a pure state machine over trials."""

from __future__ import annotations

import math

import msgspec

from phloem.shared.bench.options import SearchOptions

_GROWTH = 2.0
_LOWEST_RATE = 1e-3


class Trial(msgspec.Struct, frozen=True):
    """A rate (sessions per second), the share of good requests at it, and whether that held. It doesn't when
    the client itself was too late to tell (`is_spoiled`)."""

    rate: float
    good_share: float
    holds: bool
    is_spoiled: bool = False


class RateSearch:
    """Doubles (or halves) from the first rate until one holds and the next doesn't, then bisects.

    The answer is confirmed: its rate must hold in a second trial of its own, as a maximum over noisy trials
    is a lucky one; if it doesn't, the search goes on below it.
    """

    def __init__(self, first_rate: float, options: SearchOptions) -> None:
        self._options = options
        self._rate: float | None = first_rate
        self._low: float | None = None  # the highest rate that held
        self._high: float | None = None  # the lowest that did not
        self._is_confirming = False
        self.trials: list[Trial] = []
        self.found: float | None = None  # set when the search has ended with an answer

    @property
    def next_rate(self) -> float | None:
        """The rate to try; None when the search is over."""
        return self._rate

    def observe(self, good_share: float, *, is_spoiled: bool = False) -> Trial:
        """Takes the outcome of the trial at `next_rate`."""
        assert self._rate is not None
        holds = good_share >= self._options.share and not is_spoiled
        trial = Trial(self._rate, good_share, holds, is_spoiled)
        self.trials.append(trial)
        if self._is_confirming and trial.holds:
            self.found, self._rate = trial.rate, None
            return trial
        if trial.holds:
            self._low = trial.rate
        else:
            self._high = trial.rate
            if self._low is not None and self._low >= trial.rate:
                self._low = max(
                    (t.rate for t in self.trials if t.holds and t.rate < trial.rate), default=None
                )
        self._is_confirming = False
        self._rate = self._choose()
        return trial

    def _choose(self) -> float | None:
        if len(self.trials) >= self._options.max_trials:
            return None
        if self._low is None:
            lower = (self._high or 1.0) / _GROWTH
            return lower if lower >= _LOWEST_RATE else None
        if self._high is None:
            return self._low * _GROWTH
        if self._high / self._low <= 1 + self._options.precision:
            self._is_confirming = True
            return self._low
        return math.sqrt(self._low * self._high)

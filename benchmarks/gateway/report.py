"""Samples by name, and what is made of them."""

from __future__ import annotations

import statistics
from typing import NamedTuple

MIN_THROUGHPUT_RATIO = 0.4
MAX_CLIENT_CPU = 0.9


class Results:
    """Samples by name."""

    def __init__(self) -> None:
        self._samples: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        self._samples.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self._samples[name])

    def show(self) -> None:
        for name, values in self._samples.items():
            spread = f"{min(values):,.1f} .. {max(values):,.1f}"
            print(f"  {name:52s} {statistics.median(values):12,.1f}   ({spread})")


class Ratio(NamedTuple):
    """`bound` None: no bar, but to be known."""

    what: str
    value: float
    bound: float | None = None
    at_least: bool = True

    @property
    def met(self) -> bool:
        if self.bound is None:
            return True
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def show(self) -> None:
        verdict = ""
        if self.bound is not None:
            verdict = f"{'>=' if self.at_least else '<='} {self.bound}  {'ok' if self.met else 'MISSED'}"
        print(f"  {self.what:52s} {self.value:12.2f}   {verdict}")


def ratios(results: Results) -> list[Ratio]:
    def ratio(above: str, below: str) -> float:
        return results.median(above) / results.median(below)

    throughput = ratio("flat out, gateway [tokens/s]", "flat out, bare [tokens/s]")
    flat = ratio("flat out, bare CPU [us per token]", "flat out, gateway CPU [us per token]")
    paced = ratio("paced, bare CPU [us per token]", "paced, gateway CPU [us per token]")
    lag = max(results.median(f"flat out, client's CPU beside {name} [%]") for name in ("bare", "gateway"))
    return [
        Ratio("flat out: tokens/s of the gateway / bare", throughput, MIN_THROUGHPUT_RATIO),
        Ratio("flat out: tokens per CPU second, gateway / bare", flat),
        Ratio("paced: tokens per CPU second, gateway / bare", paced),
        Ratio("the client's share of a core", lag / 100, MAX_CLIENT_CPU, at_least=False),
    ]


def show_costs(results: Results, tokens_per_request: int) -> None:
    """The gateway's CPU time; that of tokens without their request's share."""
    request = results.median("requests, gateway CPU [us]")
    share = request / tokens_per_request
    paced = results.median("paced, gateway CPU [us per token]") - share
    flat = results.median("flat out, gateway CPU [us per token]") - share
    merged = results.median("flat out, gateway [tokens per event]")
    print(f"  CPU time of the gateway: {request:,.0f} us per request,")
    print(f"  {paced:.1f} us per token that is an event, {flat:.1f} us where {merged:.0f} tokens are one")

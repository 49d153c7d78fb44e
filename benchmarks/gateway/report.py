"""What is made of the samples of a gateway beside the bare endpoint."""

from __future__ import annotations

from benchmarks.samples import Samples
from phloem.shared.bench.bars import Bar

MIN_THROUGHPUT_RATIO = 0.4
MAX_CLIENT_CPU = 0.9


def bars_of(samples: Samples) -> list[Bar]:
    def ratio(above: str, below: str) -> float:
        return samples.median(above) / samples.median(below)

    throughput = ratio("flat out, gateway [tokens/s]", "flat out, bare [tokens/s]")
    flat = ratio("flat out, bare CPU [us per token]", "flat out, gateway CPU [us per token]")
    paced = ratio("paced, bare CPU [us per token]", "paced, gateway CPU [us per token]")
    lag = max(samples.median(f"flat out, client's CPU beside {name} [%]") for name in ("bare", "gateway"))
    return [
        Bar("flat out: tokens/s of the gateway / bare", throughput, "x", MIN_THROUGHPUT_RATIO, ">="),
        Bar("flat out: tokens per CPU second, gateway / bare", flat, "x"),
        Bar("paced: tokens per CPU second, gateway / bare", paced, "x"),
        Bar("the client's share of a core", lag / 100, "", MAX_CLIENT_CPU),
    ]


def show_costs(samples: Samples, tokens_per_request: int) -> None:
    """The gateway's CPU time; that of tokens without their request's share."""
    request = samples.median("requests, gateway CPU [us]")
    share = request / tokens_per_request
    paced = samples.median("paced, gateway CPU [us per token]") - share
    flat = samples.median("flat out, gateway CPU [us per token]") - share
    merged = samples.median("flat out, gateway [tokens per event]")
    print(f"  CPU time of the gateway: {request:,.0f} us per request,")
    print(f"  {paced:.1f} us per token that is an event, {flat:.1f} us where {merged:.0f} tokens are one")

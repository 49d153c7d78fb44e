"""What top-k and top-p cost beside sorting the vocabulary and beside FlashInfer's renormalisation, on a GPU.

    python benchmarks/bench_filters.py [--rows 1,16,64,256] [--vocab 128256]

Each line is one batch of random logits and one kind of filter: the milliseconds, on the device, of
`kernels/triton_ops/thresholds.py`, of thresholds by a sort, and of FlashInfer's softmax and renormalisation
of probabilities where `flashinfer` is installed (its deterministic sums; a "-" otherwise); and in how many
rows sorting, with masses in float64, or FlashInfer keeps other tokens than ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from benchmarks.graph_time import event_ms
from phloem.kernels.triton_ops.thresholds import thresholds

CUDA = torch.device("cuda")
BLOCK = 2048  # as `triton_ops/sampling.py` looks at rows
KINDS = ("top_p", "top_k", "both", "one row")


class Filters(NamedTuple):
    """One batch: logits float32 `[R, V]`, the largest of blocks `[R, B]`, the rest `[R]`."""

    logits: Tensor
    largest: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    kind: str

    def scores(self) -> Tensor:
        return (self.logits - self.largest.max(dim=-1, keepdim=True).values) / self.temperature[:, None]


def random_filters(rows: int, vocab: int, kind: str) -> Filters:
    """Logits as narrow as bfloat16, as a model's are: with many ties."""
    logits = (torch.randn(rows, vocab, device=CUDA) * 3).bfloat16().float()
    top_k = torch.full((rows,), 50, device=CUDA)
    top_p = torch.full((rows,), 0.95, device=CUDA)
    if kind in ("top_p", "one row"):
        top_k[:] = 0
    if kind == "top_k":
        top_p[:] = 1.0
    if kind == "one row":
        top_p[1:] = 1.0
    temperature = torch.rand(rows, device=CUDA) * 0.8 + 0.4
    largest = torch.nn.functional.pad(logits, (0, -vocab % BLOCK), value=float("-inf"))
    largest = largest.view(rows, -1, BLOCK).max(dim=-1).values
    return Filters(logits, largest, temperature, top_k, top_p, kind)


def by_sorting(batch: Filters) -> Tensor:
    """The least score that passes, float32 `[R]`."""
    vocab = batch.logits.shape[1]
    ranked = batch.scores().sort(dim=-1, descending=True).values
    limit = torch.where((batch.top_k > 0) & (batch.top_k < vocab), batch.top_k, vocab).unsqueeze(1)
    by_k = ranked.gather(1, limit - 1)
    masses = torch.where(ranked >= by_k, ranked.double(), float("-inf")).exp_()
    reached = masses.cumsum(dim=-1) / masses.sum(dim=-1, keepdim=True)
    num_kept = (reached < batch.top_p.double().unsqueeze(1)).sum(dim=-1, keepdim=True) + 1
    by_p = ranked.gather(1, num_kept.clamp(max=vocab) - 1)
    return torch.maximum(by_k, torch.where(batch.top_p.unsqueeze(1) < 1.0, by_p, float("-inf"))).squeeze(1)


def by_flashinfer(batch: Filters) -> Tensor:
    """Renormalised probabilities float32 `[R, V]`, 0 for tokens that go."""
    from flashinfer.sampling import softmax, top_k_renorm_probs, top_p_renorm_probs

    vocab = batch.logits.shape[1]
    probs = softmax(batch.logits, temperature=batch.temperature)
    if batch.kind in ("top_k", "both"):
        top_k = torch.where(batch.top_k > 0, batch.top_k, vocab).int()
        probs = top_k_renorm_probs(probs, top_k)
    if batch.kind != "top_k":
        probs = top_p_renorm_probs(probs, batch.top_p, is_deterministic=True)
    return cast(Tensor, probs)


def device_ms(work: Callable[[], object]) -> float:
    """The median of 20 calls; the device is kept busy first, so that launches queue up."""
    for _ in range(3):
        work()
    torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]
    return event_ms(work, 20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--vocab", type=int, default=128_256)
    options = parser.parse_args()
    has_flashinfer = importlib.util.find_spec("flashinfer") is not None
    print(f"{torch.cuda.get_device_name()}, {options.vocab} tokens")
    print("rows filter         ms     sort FlashInfer | other tokens kept by: sort FlashInfer")
    for rows, kind in itertools.product(map(int, options.rows.split(",")), KINDS):
        batch = random_filters(rows, options.vocab, kind)
        off = torch.zeros(rows, device=CUDA)

        def ours(batch: Filters = batch, off: Tensor = off) -> Tensor:
            return thresholds(batch.logits, batch.largest, batch.temperature, batch.top_k, batch.top_p, off)

        kept, scores = batch.scores() >= ours()[:, None], batch.scores()
        others = int((kept != (scores >= by_sorting(batch)[:, None])).any(dim=1).sum())
        times = f"{device_ms(ours):8.3f} {device_ms(partial(by_sorting, batch)):8.3f}"
        theirs, theirs_ms = "-", "-"
        if has_flashinfer:
            theirs = str(int((kept != (by_flashinfer(batch) > 0)).any(dim=1).sum()))
            theirs_ms = f"{device_ms(partial(by_flashinfer, batch)):.3f}"
        print(f"{rows:4} {kind:8} {times} {theirs_ms:>10} | {others:26} {theirs:>10}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

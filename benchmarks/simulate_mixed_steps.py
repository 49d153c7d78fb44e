"""How many prompt tokens may share a step with decode rows: latencies by bound, on a modelled GPU.

    python benchmarks/simulate_mixed_steps.py [--concurrency 64] [--input 1024] [--output 256]

The real scheduler plans every step; only the time that a step takes is modelled, after the Llama-3.1-8B
shape on one H100 (docs/measurements): it reads the weights or computes its tokens, whichever takes longer,
and reads the KV of its decode rows. Chunks of a few hundred tokens are really dearer than that. Clients in a
closed loop send the next request when one ends. The last two columns are of one prompt of 8,000 tokens that
comes while 16 requests decode.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from typing import NamedTuple

from phloem.shared.block_hash import BlockHasher
from phloem.shared.engine.kv_pool import KVPool
from phloem.shared.engine.limits import Limits
from phloem.shared.engine.page_account import PageAccount
from phloem.shared.engine.radix_tree import RadixTree
from phloem.shared.engine.requests import Request
from phloem.shared.engine.scheduler import Scheduler
from phloem.shared.engine.step_plan import StepPlan
from phloem.shared.protocol.session import SamplingParams, Submit

BOUNDS = (256, 512, 1024, 2048, 4096, 0)
PAGE_SIZE = 16
NUM_PAGES = 24_000
STEP_TOKENS = 8192

WEIGHTS_S = 0.0053  # a step at least: 16 GB of weights and what lies between the kernels
TOKEN_S = 0.0000245  # per prompt token: 1,024 of them take 25 ms
KV_TOKEN_S = 4.4e-8  # per token of context of a decode row: 131,072 bytes at 3 TB/s


class Figures(NamedTuple):
    """Seconds, and output tokens per second."""

    tokens_per_s: float
    median_itl: float
    p99_itl: float
    median_ttft: float


class Simulation:
    """One engine; a plan is made while the step before runs, as in the overlap loop."""

    def __init__(self, max_mixed_tokens: int) -> None:
        account = PageAccount(KVPool(NUM_PAGES), RadixTree(PAGE_SIZE), BlockHasher(b"simulation"))
        limits = Limits(STEP_TOKENS, 256, 1024, max_mixed_tokens=max_mixed_tokens)
        self._scheduler = Scheduler(limits, account)
        self._running: StepPlan | None = None
        self._num_submitted = 0
        self.now_s = 0.0
        self.submitted_s: dict[Request, float] = {}
        self.made_s: dict[Request, list[float]] = {}

    def submit(self, num_prompt: int, num_new: int) -> Request:
        self._num_submitted += 1
        first = self._num_submitted * num_prompt
        submit = Submit(
            request_id=str(self._num_submitted),
            attempt=1,
            epoch=1,
            phase="both",
            token_ids=list(range(first, first + num_prompt)),
            num_prompt_tokens=num_prompt,
            sampling=SamplingParams(max_tokens=num_new),
        )
        request = Request(
            submit,
            gateway=0,
            order=self._num_submitted,
            eos_token_ids=(),
            context_length=1 << 20,
            now_s=self.now_s,
        )
        self._scheduler.submit(request)
        self.submitted_s[request] = self.now_s
        self.made_s[request] = []
        return request

    def step(self) -> list[Request]:
        """Plans a step behind the one that runs, waits for that one; the requests that it ended."""
        plan = self._scheduler.schedule().plan
        self._scheduler.launched(plan)
        done, self._running = self._running, plan
        if done is None or not done.num_rows:
            return []
        self.now_s += step_s(done)
        num_tokens = done.num_rows if done.decode is not None else sum(row.samples for row in done.rows)
        made = self._scheduler.collect(done, [1] * num_tokens)
        for request in made.requests:
            self.made_s[request].append(self.now_s)
        return list(made.finished)

    def figures(self) -> Figures:
        """Of what was made in the second half of the time: the start is a burst of its own."""
        half_s = self.now_s / 2
        times = [times for times in self.made_s.values() if times]
        gaps = sorted(b - a for each in times for a, b in itertools.pairwise(each) if a >= half_s)
        late = [(r, each[0]) for r, each in self.made_s.items() if each and self.submitted_s[r] >= half_s]
        num_tokens = sum(at >= half_s for each in times for at in each)
        return Figures(
            num_tokens / (self.now_s - half_s),
            statistics.median(gaps),
            gaps[int(0.99 * len(gaps))],
            statistics.median(first_s - self.submitted_s[request] for request, first_s in late),
        )


def step_s(plan: StepPlan) -> float:
    prompt_tokens = sum(row.num_tokens for row in plan.chunks)
    if plan.decode is not None:
        context = int(plan.decode.positions.sum())
    else:
        context = sum(row.start for row in plan.rows if row.num_tokens == 1)
    return max(WEIGHTS_S, prompt_tokens * TOKEN_S) + context * KV_TOKEN_S


def closed_loop(bound: int, concurrency: int, num_prompt: int, num_new: int) -> Figures:
    world = Simulation(bound)
    for _ in range(concurrency):
        world.submit(num_prompt, num_new)
    num_left = 7 * concurrency
    while num_left:
        for _ in world.step():
            num_left -= 1
            world.submit(num_prompt, num_new)
    return world.figures()


def long_prompt(bound: int) -> tuple[float, float]:
    """TTFT of 8,000 tokens beside 16 requests that decode, and their longest gap meanwhile."""
    world = Simulation(bound)
    others = [world.submit(1024, 600) for _ in range(16)]
    while not all(len(world.made_s[request]) > 50 for request in others):
        world.step()
    request = world.submit(8000, 4)
    while not world.made_s[request]:
        world.step()
    start_s, first_s = world.submitted_s[request], world.made_s[request][0]
    gaps = [b - a for other in others for a, b in itertools.pairwise(world.made_s[other]) if b >= start_s]
    return first_s - start_s, max(gaps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--input", type=int, default=1024)
    parser.add_argument("--output", type=int, default=256)
    options = parser.parse_args()
    print("prompt tokens    tokens/s  ITL p50 ms  ITL p99 ms  TTFT p50 ms   8,000: TTFT ms  longest gap ms")
    for bound in BOUNDS:
        loop = closed_loop(bound, options.concurrency, options.input, options.output)
        ttft_s, gap_s = long_prompt(bound)
        print(
            f"{bound or 'any number':>13}  {loop.tokens_per_s:10.0f}  {1e3 * loop.median_itl:10.1f}"
            f"  {1e3 * loop.p99_itl:10.1f}  {1e3 * loop.median_ttft:11.0f}"
            f"  {1e3 * ttft_s:15.0f}  {1e3 * gap_s:14.0f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

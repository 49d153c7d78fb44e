"""A scheduler over a real pool and tree, and a device that makes the next token of each row at once."""

from __future__ import annotations

from collections import deque

from phloem.shared.block_hash import BlockHasher
from phloem.shared.engine.kv_pool import KVPool
from phloem.shared.engine.limits import Limits
from phloem.shared.engine.page_account import PageAccount
from phloem.shared.engine.radix_tree import RadixTree
from phloem.shared.engine.requests import Request, Status
from phloem.shared.engine.scheduler import Scheduler
from phloem.shared.engine.step_plan import StepPlan
from phloem.shared.protocol.session import Phase, SamplingParams, Submit

EOS = 0


RUNS = (Status.RUNNING, Status.RETRACTED)


class World:
    """A scheduler with a device that makes token `len(known) % 97 + 1` and keeps `depth` steps in flight."""

    def __init__(
        self,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        budget: int = 32,
        slots: int = 8,
        depth: int = 1,
        limits: Limits | None = None,
    ) -> None:
        self.pool = KVPool(num_pages)
        self.tree = RadixTree(page_size)
        self.account = PageAccount(self.pool, self.tree, BlockHasher(b"test"))
        self.scheduler = Scheduler(limits or Limits(budget, slots, 1000), self.account)
        self.in_flight: deque[StepPlan] = deque()
        self.depth = depth
        self.made: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.count = 0

    def add(
        self, prompt: list[int], max_tokens: int = 5, phase: Phase = "both", stop: tuple[int, ...] = ()
    ) -> Request:
        self.count += 1
        submit = Submit(
            request_id=f"r{self.count}",
            attempt=1,
            epoch=1,
            phase=phase,
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=stop),
        )
        request = Request(
            submit, gateway=0, order=self.count, eos_token_ids=(EOS,), context_length=1000, now_s=0.0
        )
        self.scheduler.submit(request)
        return request

    def step(self) -> StepPlan:
        scheduled = self.scheduler.schedule()
        assert not scheduled.refused
        if scheduled.plan.rows:
            self.scheduler.launched(scheduled.plan)
            self.in_flight.append(scheduled.plan)
        if len(self.in_flight) >= self.depth or not scheduled.plan.rows:
            self.collect()
        return scheduled.plan

    def collect(self) -> None:
        if self.in_flight:
            plan = self.in_flight.popleft()
            tokens = [(row.start + row.num_tokens) % 97 + 1 for row in plan.rows if row.samples]
            made = self.scheduler.collect(plan, tokens)
            for request, token_id in zip(made.requests, made.token_ids, strict=True):
                self.made.setdefault(request.request_id, []).append(token_id)
            for request, reason in made.finished.items():
                self.finished[request.request_id] = reason

    def audit(self) -> None:
        assert self.account.audit(self.scheduler.requests()) == []
        launched = sum(row.num_tokens for plan in self.in_flight for row in plan.chunks)
        missing = sum(_num_missing(r) for r in self.scheduler.requests() if r.status in RUNS)
        waiting = [r for r in self.scheduler.requests() if r.status is Status.WAITING and r.phase != "decode"]
        of_waiting = self.scheduler.num_queued_tokens - launched - missing
        assert len(waiting) <= of_waiting <= sum(_num_missing(r) for r in waiting)

    def drain(self, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.requests():
                return
            self.step()
            self.audit()
        raise AssertionError("the scheduler does not come to an end")


def _num_missing(request: Request) -> int:
    return len(request.token_ids) - request.num_computed_tokens

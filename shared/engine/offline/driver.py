"""Drives a real engine turn by turn in this process, and notes when each step was collected."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from phloem.shared.engine.engine_loop import Engine
from phloem.shared.engine.offline.work import GREEDY, StepSampling, staggered_tokens
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.engine import EngineSubmit, EngineUp, FlushCache, StepReport, engine_up
from phloem.shared.protocol.session import Ended, Grammar, Submit, TokensOut

# JSON objects without end: no request is over before its `max_tokens`.
ENDLESS_JSON = Grammar(
    "ebnf",
    r"""
root ::= object ", " root
object ::= "{" name ", " age ", " tags "}"
name ::= "\"name\": " string
age ::= "\"age\": " ("0" | [1-9] [0-9]*) ("." [0-9]+)?
tags ::= "\"tags\": [" string (", " string)* "]"
string ::= "\"" ([^"\\\x00-\x1f] | "\\" ["\\/bfnrt])* "\""
""",
)
GRAMMAR_TIMEOUT_S = 90.0  # more than the compiler itself is given to start


class StepTime(NamedTuple):
    """A report of the engine: when, and how many tokens it held."""

    at_s: float
    num_tokens: int


class Driver:
    """Submits batches of random prompts and runs the engine until they end. `receive` is the engine's
    `send`: give it to the engine that is then given to `attach`."""

    def __init__(self, vocab_size: int) -> None:
        self._rng = random.Random(0)
        self._vocab_size = vocab_size
        self._engine: Engine | None = None
        self._open: set[str] = set()
        self._count = 0
        self.steps: list[StepTime] = []
        self._steps_of: Counter[int] = Counter()  # by number of tokens
        self.noting_s = 0.0

    def attach(self, engine: Engine) -> None:
        self._engine = engine

    def receive(self, message: EngineUp) -> None:
        """The engine's `send`: encodes as its socket would."""
        engine_up.encode(message)
        start = time.perf_counter()
        self.note(message)
        self.noting_s += time.perf_counter() - start

    def note(self, message: EngineUp) -> None:
        """Takes what a message says about the requests; no work of the engine. Raises `PhloemError`
        (`bench_failed`) when one failed."""
        if not isinstance(message, StepReport):
            return
        num_tokens = 0
        for group in message.outputs:
            for output in group.outputs:
                match output:
                    case TokensOut():
                        num_tokens += len(output.token_ids)
                    case Ended(request_id, _, reason, error):
                        self._open.discard(request_id)
                        if reason == "failed":
                            raise PhloemError("bench_failed", error.message if error else "a request failed")
        if num_tokens:
            self.steps.append(StepTime(time.perf_counter(), num_tokens))
            self._steps_of[num_tokens] += 1

    def run_batch(
        self, batch: int, prompt_tokens: int, new_tokens: int, *, grammar_share: float = 0.0
    ) -> None:
        """Runs `batch` equal greedy requests to their end, from an empty cache."""
        self.start_batch(batch, prompt_tokens, new_tokens, grammar_share=grammar_share)
        self.run_until(lambda: False)

    def start_batch(
        self,
        batch: int,
        prompt_tokens: int,
        new_tokens: int,
        *,
        sampling: StepSampling = GREEDY,
        staggered: bool = False,
        grammar_share: float = 0.0,
    ) -> None:
        """Submits `batch` equal requests to an empty cache; `run_until` runs them.

        `staggered`: prompts are about that long (`staggered_tokens`), so that not all requests need their
        next page in the same step. `grammar_share` of the requests follow `ENDLESS_JSON`. Each has its seed.
        """
        engine = self._attached()
        engine.deliver(FlushCache(0))
        self.steps = []
        self._steps_of.clear()
        for index in range(batch):
            length = staggered_tokens(prompt_tokens, index) if staggered else prompt_tokens
            follows = int((index + 1) * grammar_share) > int(index * grammar_share)
            grammar = ENDLESS_JSON if follows else None
            engine.deliver(EngineSubmit(0, self._submit(length, new_tokens, sampling, grammar)))

    def run_until(self, enough: Callable[[], bool]) -> None:
        """Turns the engine until `enough`, or until all requests have ended.

        It sleeps when the engine has nothing to do, as a worker does: a thread that compiles a grammar would
        get the interpreter for moments only beside a loop that never lets go of it.
        """
        engine, busy = self._attached(), True
        while self._open and not enough():
            busy = engine.turn(wait=not busy)

    def prepare_grammar(self) -> float:
        """Has `ENDLESS_JSON` compiled, as the first grammar of a worker; how many seconds that took.

        Raises `PhloemError` when it takes longer than `GRAMMAR_TIMEOUT_S`, or can't be compiled here.
        """
        started_s = time.perf_counter()
        deadline_s = started_s + GRAMMAR_TIMEOUT_S
        self.start_batch(1, 1, 1, grammar_share=1.0)
        self.run_until(lambda: time.perf_counter() > deadline_s)
        if self._open:
            raise PhloemError(
                "bench_failed", f"the grammar compiler is not ready after {GRAMMAR_TIMEOUT_S:g} s"
            )
        return time.perf_counter() - started_s

    def full_steps(self, batch: int) -> int:
        return self._steps_of[batch]

    def full_step_gaps(self, batch: int) -> list[float]:
        """Seconds between reports of steps in which every request made a token."""
        return [
            later.at_s - earlier.at_s
            for earlier, later in itertools.pairwise(self.steps)
            if earlier.num_tokens == later.num_tokens == batch
        ]

    def _attached(self) -> Engine:
        assert self._engine is not None, "attach an engine first"
        return self._engine

    def timed(self, work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def _submit(
        self, prompt_tokens: int, new_tokens: int, sampling: StepSampling, grammar: Grammar | None
    ) -> Submit:
        self._count += 1
        request_id = f"offline-{self._count}"
        self._open.add(request_id)
        top = min(self._vocab_size, 40_000)
        return Submit(
            request_id=request_id,
            attempt=1,
            epoch=1,
            phase="both",
            token_ids=[self._rng.randrange(100, top) for _ in range(prompt_tokens)],
            num_prompt_tokens=prompt_tokens,
            sampling=sampling.params(new_tokens, self._count, grammar),
        )

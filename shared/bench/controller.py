"""Steers a run: probe, warm up, blocks in their order, figures, verdict."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec

from phloem.shared.bench.clients import BlockResult, ClientGroup
from phloem.shared.bench.datasets.registry import make_sessions
from phloem.shared.bench.environment import Environment, read_environment
from phloem.shared.bench.options import RunOptions
from phloem.shared.bench.plan import (
    SessionSupply,
    requests_of_round,
    schedule,
    start_block,
    warmup_sessions,
)
from phloem.shared.bench.probe import flush_cache, probe
from phloem.shared.bench.prompt_source import make_source
from phloem.shared.bench.protocol import Setup, Tick
from phloem.shared.bench.rate_search import RateSearch
from phloem.shared.bench.result import RunResult
from phloem.shared.bench.summing_up import TargetRun, sum_up
from phloem.shared.bench.ticks import TickSum
from phloem.shared.bench.token_counter import TokenCounter
from phloem.shared.errors import ConfigError

_PROBE_SEED = -1


class Watcher(Protocol):
    """Is told how the run goes. Called from the event loop: must return at once."""

    def phase(self, text: str, num_requests: int) -> None:
        """Something new begins; `num_requests` 0: their number isn't known."""
        ...

    def tick(self, tick: Tick) -> None: ...


class Controller:
    """One run. `run` may be called once."""

    def __init__(self, options: RunOptions, watcher: Watcher, command: Sequence[str]) -> None:
        """Raises `ConfigError` for options that don't go together, or files that aren't there."""
        options.check()
        self._options = options
        self._watcher = watcher
        self._command = list(command)
        self._counter = TokenCounter(Path(options.tokenizer)) if options.tokenizer else None
        ids = range(*options.token_ids) if options.token_ids else None
        self._source = make_source(options.prompt_kind, self._counter, ids)
        first = next(self._supply().take(1), None)
        if first is None:
            raise ConfigError("the dataset has no request within the limits")
        # Of the dataset's kind but none of it: what a probe leaves in a prefix cache must not be hit.
        probe_source = make_source(first.kind, self._counter, ids)
        self._example = next(warmup_sessions(iter([first]), probe_source, 1, seed=_PROBE_SEED))
        self._targets: list[TargetRun] = []
        self._groups: list[ClientGroup] = []
        self._next_block = 0
        self._num_stops = 0

    async def run(self) -> RunResult:
        """Raises `PhloemError` when a target can't be probed or a client process dies; what goes wrong with
        single requests is in the result."""
        environment = read_environment()
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        for spec in self._options.targets:
            self._watcher.phase(f"probing {spec.name}", 0)
            self._targets.append(TargetRun(await probe(spec, self._example), self._supply()))
        async with self._clients():
            await self._warm_up()
            await (self._measure_all() if self._options.search is None else self._search_all())
        return self._result(environment, started_at)

    def stop(self) -> None:
        """Begins nothing new: what was measured so far becomes the result. A second call gives up what is
        in flight."""
        self._num_stops += 1
        for group in self._groups:
            group.stop(abort=self._num_stops > 1)

    # phases

    @asynccontextmanager
    async def _clients(self) -> AsyncIterator[None]:
        """The client processes: one group for all targets, or one each when they are loaded together."""
        options = self._options
        setup = Setup(
            targets=tuple(target.probed.spec for target in self._targets),
            timeout_s=options.timeout_s,
            keep_pieces=self._counter is not None or options.save_text,
        )
        num_groups = len(self._targets) if options.order == "together" else 1
        ticks = TickSum(num_groups, self._watcher.tick)
        self._watcher.phase("starting the clients", 0)
        async with AsyncExitStack() as stack:
            for index in range(num_groups):
                group = ClientGroup(setup, options.num_clients, partial(ticks.take, index))
                self._groups.append(await stack.enter_async_context(group))
            yield

    async def _warm_up(self) -> None:
        num_requests = self._options.load.warmup_requests
        for index, target in enumerate(self._targets):
            if num_requests and not self._num_stops:
                self._watcher.phase(f"warming up {target.name}", num_requests)
                await self._run_warmup(index, num_requests)
            if self._options.flush_cache:
                await flush_cache(target.probed.spec)

    async def _run_warmup(self, index: int, num_requests: int) -> None:
        examples = self._supply().take(num_requests)
        sessions = warmup_sessions(examples, self._source, num_requests, self._options.seed)
        load = self._options.load
        places = max(1, min(load.concurrency or 1, num_requests))
        places = max(places, self._options.num_clients)
        closed = msgspec.structs.replace(
            load, concurrency=places, initial_concurrency=0, first_rate=0.0, last_rate=0.0, ramp_s=0.0
        )
        start = start_block(closed, block=self._take_block(), target=index, duration_s=0.0)
        start = msgspec.structs.replace(start, is_warmup=True)
        await self._group(index).run_block(start, sessions)

    async def _measure_all(self) -> None:
        options = self._options
        for number in range(options.num_rounds):
            order = list(range(len(self._targets)))
            if number % 2:
                order.reverse()
            if options.order == "together":
                await asyncio.gather(*(self._measure_round(index, number) for index in order))
                continue
            for index in order:
                await self._measure_round(index, number)

    async def _measure_round(self, index: int, number: int) -> None:
        options = self._options
        if self._num_stops:
            return
        if options.flush_cache and number:
            await flush_cache(self._targets[index].probed.spec)
        result = await self._run_block(
            index,
            options,
            f"round {number + 1} of {options.num_rounds}",
            num_requests=requests_of_round(options.load.num_prompts, options.num_rounds, number),
            duration_s=options.load.duration_s / options.num_rounds,
            seed=options.seed + number,
        )
        self._targets[index].add(result)

    async def _search_all(self) -> None:
        """Trials of all targets in turn. The figures are those of the last trial that held."""
        options = self._options
        assert options.search is not None
        searches = [RateSearch(options.load.first_rate, options.search) for _ in self._targets]
        while not self._num_stops and any(search.next_rate is not None for search in searches):
            for index, search in enumerate(searches):
                if search.next_rate is not None and not self._num_stops:
                    await self._try_rate(index, search)
        for target, search in zip(self._targets, searches, strict=True):
            target.trials, target.found_rate = search.trials, search.found

    async def _try_rate(self, index: int, search: RateSearch) -> None:
        rate = search.next_rate
        assert rate is not None
        load = msgspec.structs.replace(self._options.load, first_rate=rate, last_rate=rate)
        result = await self._run_block(
            index,
            msgspec.structs.replace(self._options, load=load),
            f"{rate:.3g} sessions/s",
            num_requests=load.num_prompts,
            duration_s=load.duration_s,
            seed=self._options.seed + len(search.trials),
        )
        target = self._targets[index]
        trial = target.judge_trial(search, result, self._options)
        if trial.holds or not target.results:
            target.results = [result]

    async def _run_block(
        self,
        index: int,
        options: RunOptions,
        what: str,
        *,
        num_requests: int,
        duration_s: float,
        seed: int,
    ) -> BlockResult:
        target = self._targets[index]
        self._watcher.phase(f"{target.name}: {what}", num_requests)
        sessions = schedule(
            target.supply.take(num_requests),
            options.load,
            num_requests=num_requests,
            duration_s=duration_s,
            num_turns=options.dataset.num_turns,
            seed=seed,
        )
        block = start_block(options.load, block=self._take_block(), target=index, duration_s=duration_s)
        return await self._group(index).run_block(block, sessions)

    # parts

    def _result(self, environment: Environment, started_at: str) -> RunResult:
        return sum_up(
            self._options,
            self._targets,
            self._counter,
            environment=environment,
            started_at=started_at,
            command=self._command,
            workload=self._workload(),
            is_interrupted=self._num_stops > 0,
        )

    def _supply(self) -> SessionSupply:
        options = self._options
        return SessionSupply(
            lambda: make_sessions(options.dataset, self._source, options.seed, self._counter)
        )

    def _group(self, index: int) -> ClientGroup:
        return self._groups[index if len(self._groups) > 1 else 0]

    def _take_block(self) -> int:
        self._next_block += 1
        return self._next_block - 1

    def _workload(self) -> str:
        """A digest of what decides the prompts; of a file its content."""
        options = self._options
        parts = (options.dataset, options.prompt_kind, options.token_ids, options.seed)
        digest = hashlib.blake2b(msgspec.json.encode(parts), digest_size=8)
        if options.dataset.path:
            with options.dataset.required_path().open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
        return digest.hexdigest()

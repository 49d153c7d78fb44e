"""Which sessions each block of a run gets, and when they arrive."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import msgspec

from phloem.shared.bench.arrivals import arrival_times
from phloem.shared.bench.datasets.options import session_rng
from phloem.shared.bench.options import LoadOptions
from phloem.shared.bench.prompt_source import PromptSource
from phloem.shared.bench.protocol import StartBlock
from phloem.shared.bench.session import Session, Turn

_WARMUP_TOKENS = 64
_MAX_WARMUP_OUTPUT = 32


class SessionSupply:
    """One target's sessions: the dataset from its start, for as many blocks as the run has. Every target has
    a supply of its own, so that all get the same sessions."""

    def __init__(self, make_sessions: Callable[[], Iterator[Session]]) -> None:
        self._sessions = make_sessions()

    def take(self, num_requests: int) -> Iterator[Session]:
        """Sessions of at least `num_requests` requests in all (0: without end), fewer when they run out."""
        taken = 0
        while not num_requests or taken < num_requests:
            session = next(self._sessions, None)
            if session is None:
                return
            taken += len(session.turns)
            yield session


def requests_of_round(num_prompts: int, num_rounds: int, index: int) -> int:
    """The round's part of all requests; 0 when their number isn't limited."""
    return num_prompts // num_rounds + (index < num_prompts % num_rounds) if num_prompts else 0


def schedule(
    sessions: Iterator[Session],
    load: LoadOptions,
    *,
    num_requests: int,
    duration_s: float,
    num_turns: int,
    seed: int,
) -> Iterator[Session]:
    """The sessions with their arrivals in one block, cut at `duration_s` (0: not cut).

    An open loop draws arrivals from the rate; a closed one forgets those of the dataset; otherwise the
    dataset's own are moved so that the first one is at 0.
    """
    timed: Iterator[Session]
    if load.is_open:
        rate = load.rate(num_sessions=-(-num_requests // max(num_turns, 1)), duration_s=duration_s)
        times = arrival_times(rate, load.arrival, burst_size=load.burst_size, seed=seed)
        timed = (at(session, due) for session, due in zip(sessions, times, strict=False))
    elif load.concurrency:
        return (at(session, -1.0) for session in sessions)
    else:
        timed = _from_zero(sessions)
    return itertools.takewhile(lambda session: not duration_s or session.start_s < duration_s, timed)


def start_block(load: LoadOptions, *, block: int, target: int, duration_s: float) -> StartBlock:
    """The block as the clients are told."""
    return StartBlock(
        block=block,
        target=target,
        concurrency=load.concurrency,
        initial_concurrency=load.initial_concurrency,
        ramp_s=0.0 if load.is_open else load.ramp_s or duration_s,
        duration_s=duration_s,
    )


def warmup_sessions(
    examples: Iterator[Session], source: PromptSource, num_requests: int, seed: int
) -> Iterator[Session]:
    """Random prompts as long as the dataset's first ones: they warm kernels and connections, and put
    nothing into a prefix cache that the measured requests could hit."""
    for index, example in enumerate(itertools.islice(examples, num_requests)):
        turn = example.turns[0]
        rng = session_rng(seed, "warm-up", index)
        piece = source.make(rng, turn.num_added_tokens or _WARMUP_TOKENS)
        output = min(turn.max_tokens, _MAX_WARMUP_OUTPUT)
        yield Session(index, source.kind, (Turn(piece.json, output, piece.num_tokens),))


def at(session: Session, start_s: float) -> Session:
    return msgspec.structs.replace(session, start_s=start_s)


def _from_zero(sessions: Iterator[Session]) -> Iterator[Session]:
    first: float | None = None
    for session in sessions:
        first = session.start_s if first is None else first
        yield at(session, session.start_s - first if session.start_s >= 0 else -1.0)

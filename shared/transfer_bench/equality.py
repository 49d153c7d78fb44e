"""Whether a pair of workers gives the very tokens that one unified worker gives, while requests are aborted.

The comparison is fair where the arithmetic of a row does not depend on the batch around it beyond the last
bits: float32, and weights that make ties rare. In bfloat16 two tokens are within rounding of each other
every few hundred steps, and which of them comes out depends on how the prompt was cut and on who was in the
batch: there a difference proves nothing, and none is expected to be absent.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import msgspec

from phloem.shared.protocol.session import SamplingParams
from phloem.shared.transfer_bench.engine_client import EngineClient
from phloem.shared.transfer_bench.lab import HandOver, hand_over, whole

_LATEST_ABORT_S = 0.3  # after submission; later ones are drawn as a number of tokens
_IN_FLIGHT = 16  # on the pair, and as many on the unified worker
_TOKENS_TIMEOUT_S = 120.0


class Question(msgspec.Struct, frozen=True):
    """One request, and when its client goes away: after so many seconds or tokens, or never (None). After 0
    tokens of the decode side means with token 0, when KV is on its way."""

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    abort_after_s: float | None = None
    abort_after_tokens: int | None = None

    @property
    def is_aborted(self) -> bool:
        return self.abort_after_s is not None or self.abort_after_tokens is not None


class EqualityReport(msgspec.Struct, frozen=True, kw_only=True):
    """`differing` names requests whose tokens are not those of the unified worker (of an aborted one: not a
    prefix of them); `failed` those that ended in an error. A request that its abort came too late for is
    `complete`. Of the aborted ones, `num_aborted_early` had no token and `num_aborted_between` had token 0
    but none from the decode side: their KV was on its way."""

    num_requests: int
    num_complete: int
    num_aborted: int
    num_aborted_early: int
    num_aborted_between: int
    num_tokens: int
    num_bytes_moved: int
    longest_prompt: int
    num_long_prompts: int  # of half of the longest and more
    differing: list[str]
    failed: list[str]

    @property
    def holds(self) -> bool:
        return not self.differing and not self.failed and self.num_complete > 0


def make_questions(
    count: int,
    *,
    longest_prompt: int,
    most_tokens: int,
    vocabulary: int,
    abort_share: float = 0.25,
    seed: int = 0,
) -> list[Question]:
    """Prompt lengths are drawn evenly over the powers of two from 1 to `longest_prompt`, both included; every
    third prompt goes on from an earlier one, so that parts of it are cached. Half are greedy; exactly
    `abort_share` of them, rounded, are aborted."""
    rng = random.Random(seed)
    aborted = frozenset(rng.sample(range(count), round(abort_share * count)))
    questions: list[Question] = []
    for index in range(count):
        length = {0: longest_prompt, 1: 1}.get(index) or round(longest_prompt ** rng.random())
        head = rng.choice(questions).token_ids[: length - 1] if questions and index % 3 == 2 else []
        tail = [rng.randrange(2, vocabulary) for _ in range(length - len(head))]
        question = Question(
            request_id=f"q{seed}-{index}",
            token_ids=head + tail,
            sampling=_sampling(rng, most_tokens),
        )
        questions.append(_with_abort(question, rng) if index in aborted else question)
    return questions


async def compare(
    prefill: Sequence[EngineClient],
    decode: Sequence[EngineClient],
    unified: EngineClient,
    questions: Sequence[Question],
) -> EqualityReport:
    """Asks everything of `unified` and, at the same time, of pairs of the others, taken in turn, aborting
    what wants to be. Audits all of them at the end: raises `PhloemError` (`audit_failed`)."""
    gates = asyncio.Semaphore(_IN_FLIGHT), asyncio.Semaphore(_IN_FLIGHT)

    async def alone(question: Question) -> list[int]:
        async with gates[0]:
            return await whole(unified, question.request_id, question.token_ids, question.sampling)

    async def apart(index: int, question: Question) -> HandOver:
        async with gates[1]:
            return await _ask(prefill[index % len(prefill)], decode[index % len(decode)], question)

    expected, handed = await asyncio.gather(
        asyncio.gather(*(alone(question) for question in questions)),
        asyncio.gather(*(apart(index, question) for index, question in enumerate(questions))),
    )
    audits = [await engine.audit_idle() for engine in (*prefill, *decode, unified)]
    return report_of(questions, expected, handed, sum(audit.counters["bytes_received"] for audit in audits))


async def _ask(prefill: EngineClient, decode: EngineClient, question: Question) -> HandOver:
    handed = await hand_over(prefill, decode, question.request_id, question.token_ids, question.sampling)
    if question.is_aborted:
        await _wait_to_abort(handed, question)
        await decode.abort(question.request_id)
        await prefill.abort(question.request_id)
    await handed.until_end()
    return handed


async def _wait_to_abort(handed: HandOver, question: Question) -> None:
    if question.abort_after_s is not None:
        await asyncio.sleep(question.abort_after_s)
    if question.abort_after_tokens is not None:
        await handed.prefill.until_tokens(1, _TOKENS_TIMEOUT_S)
        await handed.decode.until_tokens(question.abort_after_tokens, _TOKENS_TIMEOUT_S)


def report_of(
    questions: Sequence[Question],
    expected: Sequence[list[int]],
    handed: Sequence[HandOver],
    num_bytes: int,
) -> EqualityReport:
    """The judgement of what was asked (in order: the tokens of one engine, and the pair's streams)."""
    differing, failed = [], []
    for question, tokens, pair in zip(questions, expected, handed, strict=True):
        if _went_wrong(question, pair):
            failed.append(f"{question.request_id}: {pair.error}")
        elif pair.token_ids != (tokens if pair.is_complete else tokens[: len(pair.token_ids)]):
            differing.append(_difference(question, pair.token_ids, tokens))
    aborted = [
        pair
        for question, pair in zip(questions, handed, strict=True)
        if not pair.is_complete and not _went_wrong(question, pair)
    ]
    lengths = [len(question.token_ids) for question in questions]
    return EqualityReport(
        num_requests=len(questions),
        num_complete=sum(pair.is_complete for pair in handed),
        num_aborted=len(aborted),
        num_aborted_early=sum(not pair.token_ids for pair in aborted),
        num_aborted_between=sum(
            len(pair.prefill.token_ids) > len(pair.decode.token_ids) == 0 for pair in aborted
        ),
        num_tokens=sum(len(pair.token_ids) for pair in handed),
        num_bytes_moved=num_bytes,
        longest_prompt=max(lengths),
        num_long_prompts=sum(2 * length >= max(lengths) for length in lengths),
        differing=differing,
        failed=failed,
    )


def _went_wrong(question: Question, pair: HandOver) -> bool:
    """A request that nobody aborted completes; one that was may also end as cancelled by the other side."""
    if pair.is_complete:
        return False
    if not question.is_aborted:
        return True
    allowed = (None, "handover_cancelled", "aborted")
    return any(stream.error is not None and stream.error.code not in allowed for stream in pair)


def _difference(question: Question, got: list[int], expected: list[int]) -> str:
    at = next((n for n, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), len(expected))
    kind = "greedy" if question.sampling.temperature == 0 else "sampled"
    return f"{question.request_id} ({kind}, {len(question.token_ids)} tokens in): differs from token {at} on"


def _sampling(rng: random.Random, most_tokens: int) -> SamplingParams:
    max_tokens = rng.randint(1, most_tokens)
    if rng.random() < 0.5:
        return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=rng.choice((0.5, 0.8, 1.0)),
        top_p=rng.choice((0.9, 1.0)),
        top_k=rng.choice((0, 20)),
        seed=rng.getrandbits(63),
        ignore_eos=True,
    )


def _with_abort(question: Question, rng: random.Random) -> Question:
    """Half by the clock, most of them early; a quarter with token 0; the rest in the first half of the
    answer, since word of an abort takes a step or two."""
    draw = rng.random()
    if draw < 0.5:
        return msgspec.structs.replace(question, abort_after_s=_LATEST_ABORT_S * rng.random() ** 2)
    latest = 0 if draw < 0.75 else question.sampling.max_tokens // 2
    return msgspec.structs.replace(question, abort_after_tokens=rng.randint(0, latest))


def explain(report: EqualityReport) -> list[str]:
    """What the report says, in lines."""
    lines = [
        f"{report.num_requests} requests up to {report.longest_prompt} tokens, {report.num_long_prompts} of "
        f"half of that and more: {report.num_complete} complete, {report.num_aborted} aborted "
        f"({report.num_aborted_early} before token 0, {report.num_aborted_between} between it and token 1), "
        f"{report.num_tokens} tokens compared, {report.num_bytes_moved / 1e6:.0f} MB of KV moved"
    ]
    lines += [f"DIFFERS {line}" for line in report.differing]
    lines += [f"FAILED {line}" for line in report.failed]
    return lines

"""Engines apart give the tokens of one engine, while requests are aborted and workers come and go."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from phloem.shared.errors import PhloemError
from phloem.shared.transfer_bench.engine_client import EngineClient
from phloem.shared.transfer_bench.equality import Question, compare, make_questions
from phloem.shared.transfer_bench.lab import hand_over, prove_channel, whole
from tests.support.transfer_lab import VOCABULARY, tiny_lab, tiny_model

_RETRIES = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


async def test_pair_gives_the_tokens_of_a_unified_worker(model: Path, tmp_path: Path) -> None:
    questions = make_questions(48, longest_prompt=900, most_tokens=12, vocabulary=VOCABULARY, seed=3)
    async with tiny_lab(model, tmp_path) as lab:
        prefill, decode, unified = await asyncio.gather(
            lab.start("prefill"), lab.start("decode"), lab.start("unified")
        )
        await prefill.peer_up(decode)
        report = await compare([prefill], [decode], unified, questions)
    assert (report.differing, report.failed) == ([], [])
    assert report.num_complete >= 30 and report.num_aborted >= 4
    assert report.longest_prompt == 900 and report.num_bytes_moved > 1_000_000


class Pairs:
    """Which engines serve now. A stand-in for the gateway: it asks again when a worker is lost."""

    def __init__(self, prefill: list[EngineClient], decode: list[EngineClient]) -> None:
        self.prefill = prefill
        self.decode = decode
        self._count = 0
        self.num_retries = 0

    async def ask(self, question: Question) -> list[int]:
        for attempt in range(_RETRIES):
            self._count += 1
            p = self.prefill[self._count % len(self.prefill)]
            d = self.decode[(self._count // 2) % len(self.decode)]
            name = f"{question.request_id}-{attempt}"
            try:
                pair = await hand_over(p, d, name, question.token_ids, question.sampling)
                await pair.until_end()
            except PhloemError as error:
                assert error.code == "engine_died", error
            else:
                if pair.is_complete:
                    return pair.token_ids
                assert pair.error is not None and pair.error.retryable, pair.error
            self.num_retries += 1
        raise AssertionError(f"{question.request_id} failed {_RETRIES} times")


async def test_counts_change_under_load_and_nobody_else_restarts(model: Path, tmp_path: Path) -> None:
    """2 P and 1 D become 1 P and 2 D; the prefill worker that leaves dies, the decode worker that joins is
    served by a worker that was there before."""
    questions = make_questions(
        40, longest_prompt=400, most_tokens=10, vocabulary=VOCABULARY, abort_share=0.0, seed=5
    )
    async with tiny_lab(model, tmp_path) as lab:
        first, second, decode, unified = await asyncio.gather(
            lab.start("prefill"), lab.start("prefill"), lab.start("decode"), lab.start("unified")
        )
        expected = [await whole(unified, q.request_id, q.token_ids, q.sampling) for q in questions]
        pairs = Pairs([first, second], [decode])
        for prefill in pairs.prefill:
            await prefill.peer_up(decode)
            await prove_channel(prefill, decode, f"channel of {prefill.ref.worker_id}")
        gate = asyncio.Semaphore(6)

        async def ask(question: Question) -> list[int]:
            async with gate:
                return await pairs.ask(question)

        asking = [asyncio.create_task(ask(question)) for question in questions]
        await asking[5]
        joined = await lab.start("decode")
        await first.peer_up(joined)
        pairs.prefill, pairs.decode = [first], [decode, joined]
        await lab.kill(second)
        await decode.peer_down(second.ref)
        assert await asyncio.gather(*asking) == expected
        assert not any(engine.is_gone for engine in (first, decode, joined))
        await prove_channel(first, joined, "after it all")
        for engine in (first, decode, joined, unified):
            await engine.audit_idle()
        assert (await joined.audit()).counters["bytes_received"] > 0

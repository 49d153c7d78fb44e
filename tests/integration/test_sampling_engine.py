"""Seeded sampling through real engines: a request's tokens depend on its prompt, seed and parameters only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.protocol.session import SamplingParams
from tests.support.engine_cluster import running_cluster
from tests.support.engines import EngineSpec, LocalEngine, engine_threads, one_thread
from tests.support.tiny_model import random_prompt, tiny_decoder

MAX_TOKENS = 48


class Case(NamedTuple):
    prompt: list[int]
    sampling: SamplingParams


def _sampling(index: int) -> SamplingParams:
    """Every filter and temperature in turn; each fifth request is greedy."""
    return SamplingParams(
        max_tokens=MAX_TOKENS,
        temperature=(0.0, 1.0, 0.7, 1.3, 2.0)[index % 5],
        top_k=(0, 0, 20)[index % 3],
        top_p=(1.0, 0.9)[index % 2],
        min_p=(0.0, 0.0, 0.0, 0.02)[index % 4],
        seed=(index - 8) * 1_234_567_890_123_456_789 % (1 << 63) * (-1) ** index,
        ignore_eos=True,
    )


CASES = [Case(random_prompt(5 + 11 * index, index), _sampling(index)) for index in range(16)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder()


@pytest.fixture(scope="module")
def expected(decoder: Decoder) -> list[list[int]]:
    """The tokens of each case when it runs alone, in one chunk, on a fresh engine."""
    alone = []
    with LocalEngine("alone", decoder, EngineSpec()) as engine:
        for index in range(len(CASES)):
            alone += _run(engine, [index])
            engine.flush()
    return alone


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert engine_threads() == []


def _run(engine: LocalEngine, indices: list[int]) -> list[list[int]]:
    for index in indices:
        engine.submit(f"case {index}", *CASES[index])
    streams = [engine.wait_end(f"case {index}") for index in indices]
    assert {stream.finish_reason for stream in streams} == {"length"}
    return [stream.token_ids for stream in streams]


def test_tokens_are_many_and_differ_between_cases(expected: list[list[int]]) -> None:
    """Otherwise the other tests would prove little."""
    for index, tokens in enumerate(expected):
        assert len(tokens) == MAX_TOKENS
        if CASES[index].sampling.temperature >= 1.0:
            assert len(set(tokens)) > MAX_TOKENS // 4
    assert len({tuple(tokens) for tokens in expected}) == len(CASES)


def test_same_seed_gives_the_same_tokens_in_a_batch_of_16(
    decoder: Decoder, expected: list[list[int]]
) -> None:
    with LocalEngine("batch", decoder, EngineSpec()) as engine:
        assert _run(engine, list(range(16))) == expected
        engine.audit_idle()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 64])
def test_same_seed_gives_the_same_tokens_in_chunks_of_any_size(
    decoder: Decoder, expected: list[list[int]], chunk_tokens: int, overlap: bool
) -> None:
    indices = list(range(0, 16, 3))
    with LocalEngine("chunks", decoder, EngineSpec(chunk_tokens=chunk_tokens, overlap=overlap)) as engine:
        assert _run(engine, indices) == [expected[index] for index in indices]


@pytest.mark.parametrize("cached", [True, False])
def test_resumed_request_goes_on_with_the_same_tokens(
    decoder: Decoder, expected: list[list[int]], cached: bool
) -> None:
    with LocalEngine("resumed", decoder, EngineSpec()) as engine:
        for index in (1, 2, 8, 13):
            prompt, sampling = CASES[index]
            for emitted in (1, 5, 31, MAX_TOKENS - 1):
                request_id = f"case {index} after {emitted}"
                known = prompt + expected[index][:emitted]
                engine.submit(request_id, known, sampling, num_prompt_tokens=len(prompt))
                stream = engine.wait_end(request_id)
                assert stream.token_ids == expected[index][emitted:]
                assert stream.finish_reason == "length"
                if not cached:
                    engine.flush()


def test_same_seed_gives_the_same_tokens_through_a_hand_over(
    decoder: Decoder, expected: list[list[int]]
) -> None:
    with running_cluster(decoder, spec=EngineSpec(chunk_tokens=64)) as cluster:
        for index, case in enumerate(CASES):
            cluster.submit(f"case {index}", *case)
        found = [cluster.wait_tokens(f"case {index}") for index in range(16)]
        assert found == expected


def test_request_resumed_through_a_hand_over_goes_on_with_the_same_tokens(
    decoder: Decoder, expected: list[list[int]]
) -> None:
    with running_cluster(decoder) as cluster:
        for index, emitted in ((2, 1), (6, 17), (14, MAX_TOKENS - 2)):
            prompt, sampling = CASES[index]
            known = prompt + expected[index][:emitted]
            cluster.submit(f"case {index}", known, sampling, num_prompt_tokens=len(prompt))
            assert cluster.wait_tokens(f"case {index}") == expected[index][emitted:]


def test_retracted_request_goes_on_with_the_same_tokens(decoder: Decoder, expected: list[list[int]]) -> None:
    indices = [0, 1, 2, 3, 4, 6, 7]
    with LocalEngine("small", decoder, EngineSpec(num_pages=96, page_size=4)) as engine:
        assert _run(engine, indices) == [expected[index] for index in indices]
        assert engine.audit_idle().counters["retractions"] > 0


def test_another_seed_gives_other_tokens_and_the_request_id_does_not_matter(decoder: Decoder) -> None:
    prompt = CASES[4].prompt
    seeds = [0, 1, -1, 1 << 62, 1]
    with LocalEngine("seeds", decoder, EngineSpec()) as engine:
        for index, seed in enumerate(seeds):
            engine.submit(f"{index}", prompt, SamplingParams(max_tokens=MAX_TOKENS, seed=seed))
        found = [tuple(engine.wait_end(f"{index}").token_ids) for index in range(len(seeds))]
    assert found[1] == found[4]
    assert len(set(found)) == 4


def test_greedy_tokens_do_not_depend_on_the_seed(decoder: Decoder, expected: list[list[int]]) -> None:
    prompt = CASES[0].prompt
    with LocalEngine("greedy", decoder, EngineSpec()) as engine:
        for seed in (3, 4):
            engine.submit(
                f"{seed}", prompt, SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, seed=seed)
            )
            assert engine.wait_end(f"{seed}").token_ids == expected[0]

"""Greedy tokens of real engines equal those of transformers on the same weights, however they are computed.

The demo model in float32. Two sums in another order differ by about 1e-5 in a logit; the reference's own
choices are at least `CLEAR_GAP` apart, so that no difference can be blamed on rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.protocol.session import SamplingParams
from tests.support.engine_cluster import running_cluster
from tests.support.engines import EngineSpec, LocalEngine, engine_threads, load_float32, one_thread
from tests.support.reference import MAX_TOKENS, Expected, Reference, assert_equal, encode_prompts

CLEAR_GAP = 1e-3
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0)
CACHED = [14, 15, 16, 17, 18, 19]  # longer than two pages
SOME = [2, 14, 15, 17, 18, 19]  # for what is not asked of all 20; the longest prompt is the last
ROOMY = EngineSpec(num_pages=300)


class Oracle(NamedTuple):
    decoder: Decoder
    prompts: list[list[int]]
    expected: list[Expected]

    def check(self, index: int, found: list[int]) -> None:
        assert_equal(found, self.expected[index], f"prompt {index} ({len(self.prompts[index])} tokens)")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def reference(smollm2_dir: Path, _one_thread: None) -> Reference:
    return Reference(smollm2_dir)


@pytest.fixture(scope="module")
def oracle(smollm2_dir: Path, reference: Reference) -> Oracle:
    prompts = encode_prompts(smollm2_dir)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    expected: dict[int, Expected] = {}
    for part in (by_length[:16], by_length[16:]):  # two batches: little padding
        expected.update(zip(part, reference.greedy([prompts[index] for index in part]), strict=True))
    return Oracle(load_float32(smollm2_dir), prompts, [expected[index] for index in range(len(prompts))])


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert engine_threads() == []


def test_reference_is_unambiguous_and_varied(oracle: Oracle) -> None:
    assert len(oracle.prompts) == 20
    assert min(len(prompt) for prompt in oracle.prompts) < 4
    assert max(len(prompt) for prompt in oracle.prompts) == len(oracle.prompts[SOME[-1]]) > 250
    for index, expected in enumerate(oracle.expected):
        assert len(expected.token_ids) == MAX_TOKENS
        assert min(expected.gaps) > CLEAR_GAP, f"prompt {index}: choose another, two tokens are nearly tied"


def test_padding_does_not_change_the_reference(oracle: Oracle, reference: Reference) -> None:
    """The shortest of each batch, which was padded most."""
    for index in (0, 15):
        assert_equal(
            reference.greedy([oracle.prompts[index]])[0].token_ids, oracle.expected[index], "unpadded"
        )


def test_all_prompts_in_one_unified_engine(oracle: Oracle) -> None:
    with LocalEngine("unified", oracle.decoder, ROOMY) as engine:
        for index, prompt in enumerate(oracle.prompts):
            engine.submit(f"{index}", prompt, GREEDY)
        for index in range(len(oracle.prompts)):
            oracle.check(index, engine.wait_end(f"{index}").token_ids)
        engine.audit_idle()


def test_all_prompts_through_a_hand_over(oracle: Oracle) -> None:
    with running_cluster(oracle.decoder, spec=ROOMY) as cluster:
        for index, prompt in enumerate(oracle.prompts):
            cluster.submit(f"{index}", prompt, GREEDY)
        for index in range(len(oracle.prompts)):
            oracle.check(index, cluster.wait_tokens(f"{index}"))


def test_alone(oracle: Oracle) -> None:
    with running_cluster(oracle.decoder, spec=ROOMY) as cluster:
        cluster.submit("alone", oracle.prompts[19], GREEDY)
        oracle.check(19, cluster.wait_tokens("alone"))


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(EngineSpec(num_pages=300, chunk_tokens=16), id="chunks of 16"),
        pytest.param(EngineSpec(num_pages=1600, page_size=1), id="page size 1"),
        pytest.param(EngineSpec(num_pages=300, page_size=16, staging_bytes=100_000), id="layers in groups"),
    ],
)
def test_other_sizes(oracle: Oracle, spec: EngineSpec) -> None:
    with running_cluster(oracle.decoder, spec=spec) as cluster:
        for index in SOME:
            cluster.submit(f"{index}", oracle.prompts[index], GREEDY)
        for index in SOME:
            oracle.check(index, cluster.wait_tokens(f"{index}"))


@pytest.mark.parametrize("cached_at", ["P", "D", "P and D"])
def test_prompt_is_half_cached(oracle: Oracle, cached_at: str) -> None:
    with running_cluster(oracle.decoder, spec=ROOMY) as cluster:
        p, d = cluster.prefill[0], cluster.decode[0]
        for index in CACHED:  # a salt for each: some begin alike
            if "P" in cached_at:
                _cache(p, index, oracle)
            if "D" in cached_at:
                _cache(d, index, oracle)
        for index in CACHED:
            cluster.submit(f"{index}", oracle.prompts[index], GREEDY, salt=f"{index}")
        for index in CACHED:
            oracle.check(index, cluster.wait_tokens(f"{index}"))
            cached = _half(index, oracle) if "P" in cached_at else 0
            assert p.stream(f"{index}").num_cached_tokens == cached
        held = sum(_half(index, oracle) // 16 for index in CACHED) if "D" in cached_at else 0
        wanted = sum(_num_pages(oracle.prompts[index]) for index in CACHED) - held
        assert p.audit().counters["pages_sent"] == d.audit().counters["pages_received"] == wanted


def _half(index: int, oracle: Oracle) -> int:
    """Tokens in whole pages of 16, at most half of the prompt."""
    return len(oracle.prompts[index]) // 32 * 16


def _cache(engine: LocalEngine, index: int, oracle: Oracle) -> None:
    half = oracle.prompts[index][: _half(index, oracle)]
    assert half
    engine.submit(f"half of {index}", half, ONE_TOKEN, salt=f"{index}")
    assert engine.wait_end(f"half of {index}").ended == "finished"


def _num_pages(prompt: list[int]) -> int:
    return -(-len(prompt) // 16)


def test_eight_others_run_in_the_batch(oracle: Oracle) -> None:
    endless = SamplingParams(max_tokens=400, temperature=0.0)
    with running_cluster(oracle.decoder, spec=ROOMY) as cluster:
        p, d = cluster.prefill[0], cluster.decode[0]
        others = range(8)
        for index in others:
            cluster.submit(f"{index}", oracle.prompts[index], endless)
        d.wait(lambda: all(d.stream(f"{index}").token_ids for index in others), "8 running requests")
        cluster.submit("19", oracle.prompts[19], GREEDY)
        oracle.check(19, cluster.wait_tokens("19"))
        for index in others:
            assert d.stream(f"{index}").ended is None, "it should have run all the time"
            found = p.stream(f"{index}").token_ids + d.stream(f"{index}").token_ids
            oracle.check(index, found[:MAX_TOKENS])
            d.abort(f"{index}")
        for index in others:
            assert d.wait_end(f"{index}").ended == "aborted"


def test_two_prefill_and_two_decode_engines(oracle: Oracle) -> None:
    indices = [2, 3, 7, 10, *SOME[-4:]]
    pairs = {index: (n % 2, n // 2 % 2) for n, index in enumerate(indices)}
    with running_cluster(oracle.decoder, 2, 2, spec=ROOMY) as cluster:
        for index, (p, d) in pairs.items():
            cluster.submit(f"{index}", oracle.prompts[index], GREEDY, p=p, d=d)
        for index, (p, d) in pairs.items():
            oracle.check(index, cluster.wait_tokens(f"{index}", p=p, d=d))
        for side in (0, 1):
            assert cluster.prefill[side].audit().counters["steps"] > 0
            assert cluster.decode[side].audit().counters["pages_received"] > 0


@pytest.mark.parametrize("where", ["unified", "decode"])
def test_request_was_retracted(oracle: Oracle, where: str) -> None:
    indices = [19, 0, 1, 2, 4, 5]
    tight = EngineSpec(num_pages=26)  # enough for the first and one of the others to the end
    with running_cluster(oracle.decoder, spec=ROOMY, decode_spec=tight) as cluster:
        d = cluster.decode[0]
        for index in indices:
            if where == "unified":
                d.submit(f"{index}", oracle.prompts[index], GREEDY)
            else:
                cluster.submit(f"{index}", oracle.prompts[index], GREEDY)
        for index in indices:
            name = f"{index}"
            oracle.check(
                index, d.wait_end(name).token_ids if where == "unified" else cluster.wait_tokens(name)
            )
        assert d.audit().counters["retractions"] > 0

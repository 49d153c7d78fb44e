"""Only KV pages that the decode worker lacks are sent to it; bytes are counted exactly, on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.kv_cache import bytes_per_page
from phloem.shared.protocol.session import SamplingParams
from tests.support.engine_cluster import EngineCluster, running_cluster
from tests.support.engines import EngineSpec, engine_threads, one_thread
from tests.support.tiny_model import random_prompt, tiny_decoder

PAGE = 16
SAMPLING = SamplingParams(max_tokens=20, temperature=0.8, seed=5, ignore_eos=True)


class Moved(NamedTuple):
    """What one request moved from the prefill to the decode engine."""

    num_pages: int
    num_bytes: int


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert engine_threads() == []


def _moved(cluster: EngineCluster) -> Moved:
    """So far; all four counts of it agree."""
    p, d = cluster.prefill[0], cluster.decode[0]
    sent, received = p.audit_idle().counters, d.audit_idle().counters
    assert sent["pages_sent"] == received["pages_received"]
    stats = [p.endpoint.stats()[d.ref].bytes_sent, d.endpoint.stats()[p.ref].bytes_received]
    assert stats == [sent["bytes_sent"], received["bytes_received"]] == [sent["bytes_sent"]] * 2
    return Moved(sent["pages_sent"], sent["bytes_sent"])


def _turn(
    cluster: EngineCluster, request_id: str, prompt: list[int], salt: str = ""
) -> tuple[list[int], Moved]:
    """The tokens that a turn of a conversation makes, and what it moved."""
    before = _moved(cluster)
    cluster.submit(request_id, prompt, SAMPLING, salt=salt)
    tokens = cluster.wait_tokens(request_id)
    after = _moved(cluster)
    return tokens, Moved(after.num_pages - before.num_pages, after.num_bytes - before.num_bytes)


def _pages(num_pages: int, decoder: Decoder) -> Moved:
    return Moved(num_pages, num_pages * bytes_per_page(decoder.config, PAGE, decoder.dtype))


@pytest.mark.parametrize("staging_bytes", [1 << 20, 4096])
def test_second_turn_sends_only_the_new_pages(decoder: Decoder, staging_bytes: int) -> None:
    spec = EngineSpec(page_size=PAGE, staging_bytes=staging_bytes)
    with running_cluster(decoder, spec=spec) as cluster:
        first = random_prompt(50, 1)
        answer, moved = _turn(cluster, "first", first)
        assert moved == _pages(4, decoder)
        # The decode worker holds prompt and answer but the last token: 69 tokens, 4 full pages.
        second = first + answer + random_prompt(30, 2)
        again, moved = _turn(cluster, "second", second)
        assert moved == _pages(7 - 4, decoder)
        # 100 + 19 tokens now, 7 full pages.
        third = second + again + random_prompt(41, 3)
        _, moved = _turn(cluster, "third", third)
        assert moved == _pages(11 - 7, decoder)
        fresh, _ = _turn(cluster, "second, nothing cached", second, salt="other")
        assert fresh == again


def test_prompt_that_the_decode_worker_holds_moves_nothing(decoder: Decoder) -> None:
    with running_cluster(decoder, spec=EngineSpec(page_size=PAGE)) as cluster:
        prompt = random_prompt(4 * PAGE, 7)
        tokens, moved = _turn(cluster, "first", prompt)
        assert moved == _pages(4, decoder)
        assert _turn(cluster, "again", prompt) == (tokens, _pages(0, decoder))


def test_flushed_or_differently_salted_prefix_is_sent_again(decoder: Decoder) -> None:
    with running_cluster(decoder, spec=EngineSpec(page_size=PAGE)) as cluster:
        prompt = random_prompt(40, 9)
        tokens, _ = _turn(cluster, "first", prompt)
        assert _turn(cluster, "salted", prompt, salt="tenant") == (tokens, _pages(3, decoder))
        cluster.decode[0].flush()
        assert _turn(cluster, "flushed at D", prompt) == (tokens, _pages(3, decoder))
        assert cluster.prefill[0].stream("flushed at D").num_cached_tokens == 2 * PAGE
        cluster.prefill[0].flush()
        assert _turn(cluster, "flushed at P", prompt) == (tokens, _pages(1, decoder))
        assert cluster.prefill[0].stream("flushed at P").num_cached_tokens == 0


def test_turns_at_another_prefill_worker_send_only_what_the_decode_worker_lacks(decoder: Decoder) -> None:
    with running_cluster(decoder, 2, 1, spec=EngineSpec(page_size=PAGE)) as cluster:
        first = random_prompt(33, 4)
        cluster.submit("first", first, SAMPLING, p=0)
        second = first + cluster.wait_tokens("first", p=0)
        cluster.submit("second", second, SAMPLING, p=1)
        cluster.wait_tokens("second", p=1)
        assert cluster.prefill[0].audit_idle().counters["pages_sent"] == 3
        # It holds 33 + 19 tokens, 3 full pages, of the 53 that are 4 pages.
        assert cluster.prefill[1].audit_idle().counters["pages_sent"] == 1

"""The simulated cluster: figures worked out by hand, and laws that hold for every run."""

from __future__ import annotations

import msgspec
import pytest

from phloem.simulate.cluster import SimulatedCluster
from phloem.simulate.options import ClusterShape, Delays, SimulationOptions, StepModel
from phloem.simulate.oracle import lru_hit_rate
from phloem.simulate.result import run
from phloem.simulate.step_time import decode_s, prefill_s
from phloem.simulate.workload import SimRequest, shared_prefix

MODEL = StepModel()
DELAYS = Delays()
TO_WORKER_S = DELAYS.lookup_s + DELAYS.hop_s  # from the arrival until a worker has the submission
POLICIES = ["cost", "prefix", "cache_aware", "least_loaded", "round_robin", "random"]


def _options(**shape: int) -> SimulationOptions:
    return SimulationOptions(shape=ClusterShape(**shape))


def _one_of_each(policy: str = "round_robin") -> SimulationOptions:
    shape = ClusterShape(num_prefill=1, num_decode=1)
    return SimulationOptions(policy=policy, shape=shape)


def _request(
    index: int, arrival_s: float, num_tokens: int, content: list[int], output: int = 9
) -> SimRequest:
    return SimRequest(index, arrival_s, num_tokens, output, content)


# -- one worker, by hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", [1, 8, 16])
def test_ttft_of_one_prompt_is_the_way_there_the_chunks_and_the_way_back(grain: int) -> None:
    shape = ClusterShape(num_prefill=1, num_decode=1, grain=grain, page_tokens=64 * grain)
    options = msgspec.structs.replace(_one_of_each(), shape=shape)
    (outcome,) = SimulatedCluster([_request(0, 1.0, 10_240, list(range(20)))], options).run()
    chunks_s = prefill_s(MODEL, 0, 8192) + prefill_s(MODEL, 8192, 2048)
    assert outcome.ttft_s == pytest.approx(TO_WORKER_S + chunks_s + DELAYS.hop_s)
    assert outcome.cached_tokens == 0


def test_a_prompt_seen_before_costs_only_its_last_page() -> None:
    requests = [_request(0, 0.0, 4096, list(range(8))), _request(1, 30.0, 4096, list(range(8)))]
    first, second = SimulatedCluster(requests, _one_of_each()).run()
    assert (first.cached_tokens, second.cached_tokens) == (0, 4096 - 512)
    expected_s = TO_WORKER_S + prefill_s(MODEL, 4096 - 512, 512) + DELAYS.hop_s
    assert second.ttft_s == pytest.approx(expected_s)


def test_a_prompt_waits_for_the_one_before() -> None:
    requests = [_request(0, 0.0, 8192, list(range(16))), _request(1, 0.0, 1024, [50, 51])]
    first, second = SimulatedCluster(requests, _one_of_each()).run()
    assert second.ttft_s == pytest.approx(first.ttft_s + prefill_s(MODEL, 0, 1024))


def test_tokens_after_the_first_wait_for_the_transfer_and_come_step_by_step() -> None:
    options = _one_of_each()
    options = msgspec.structs.replace(
        options, shape=msgspec.structs.replace(options.shape, grain=1, page_tokens=64)
    )
    (outcome,) = SimulatedCluster([_request(0, 0.0, 1024, [1, 2], output=4)], options).run()
    transfer_s = 1024 * MODEL.kv_bytes_per_token / DELAYS.transfer_bytes_per_s + DELAYS.transfer_latency_s
    steps_s = sum(decode_s(MODEL, 1, 1024 + n) for n in range(3))
    assert outcome.finished_s - outcome.first_token_s == pytest.approx(transfer_s + steps_s)


def test_a_unified_worker_does_both_phases() -> None:
    options = _options(num_prefill=0, num_decode=0, num_unified=1)
    (outcome,) = SimulatedCluster([_request(0, 0.0, 1024, [1, 2])], options).run()
    assert outcome.is_local
    assert outcome.ttft_s == pytest.approx(TO_WORKER_S + prefill_s(MODEL, 0, 1024) + DELAYS.hop_s)


def test_twice_the_rate_halves_the_gaps() -> None:
    requests = [_request(0, 0.0, 100, [1]), _request(1, 10.0, 100, [2])]
    options = msgspec.structs.replace(_one_of_each(), rate_scale=2.0)
    assert [outcome.arrival_s for outcome in SimulatedCluster(requests, options).run()] == [0.0, 5.0]


# -- laws --------------------------------------------------------------------------------------------------


def _workload(seed: int) -> list[SimRequest]:
    return shared_prefix(400, rate=60.0, seed=seed, prefix_tokens=2048, num_others=6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_gateways", [1, 3])
def test_every_request_ends_once_and_every_page_has_one_owner(policy: str, num_gateways: int) -> None:
    shape = ClusterShape(num_prefill=3, num_decode=2, num_unified=1, num_gateways=num_gateways)
    requests = _workload(1)
    result = run(requests, SimulationOptions(policy=policy, shape=shape))
    assert result.problems == []
    assert result.num_requests == len(requests)
    assert result.hit_rate <= lru_hit_rate(requests, None)
    assert 0.0 < result.ttft_p50_s <= result.ttft_p90_s <= result.ttft_p99_s


@pytest.mark.parametrize("kv_tokens", [10_240, 16_384])
def test_pools_that_hold_two_prompts_evict_wait_and_lose_nothing(kv_tokens: int) -> None:
    shape = ClusterShape(num_prefill=2, num_decode=2, kv_tokens=kv_tokens)
    result = run(_workload(2)[:60], SimulationOptions(policy="random", shape=shape))
    assert result.problems == []


def test_requests_in_each_others_way_go_again_and_all_end() -> None:
    """Prefill holds a prompt that decode has no room for, and has no room itself for the one that decode
    reserved for."""
    shape = ClusterShape(num_prefill=2, num_decode=2, kv_tokens=6144)
    requests = [_request(n, n * 0.01, 4096, list(range(10 * n, 10 * n + 8)), output=200) for n in range(40)]
    result = run(requests, SimulationOptions(policy="random", shape=shape, seed=3))
    assert result.problems == []
    assert result.num_retries > 0


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    shape = ClusterShape(num_prefill=3, num_decode=3, num_gateways=2)
    runs = [run(_workload(4)[:150], SimulationOptions(shape=shape, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0].ttfts_s != runs[2].ttfts_s


def test_one_worker_reaches_what_one_lru_cache_of_its_size_does() -> None:
    requests = [_request(n, 5.0 * n, 4096, list(range(8 * (n % 3), 8 * (n % 3) + 8))) for n in range(12)]
    result = run(requests, _one_of_each())
    whole_pages = (4096 - 512) / 4095  # the last page is computed again for its last token
    assert result.hit_rate == pytest.approx(lru_hit_rate(requests, None) * whole_pages)


def test_gateways_that_hear_of_load_late_collide() -> None:
    """Ten times the interval of the heartbeats and no word between: eight gateways pile up on one worker."""
    requests = shared_prefix(300, rate=30.0, seed=5, prefix_tokens=2048)
    shape = ClusterShape(num_prefill=4, num_decode=4, num_gateways=8)
    stale = Delays(heartbeat_s=10.0, tell_s=0.0, announce_ttl_s=0.0)
    one = run(requests, SimulationOptions(shape=msgspec.structs.replace(shape, num_gateways=1)))
    late = run(requests, SimulationOptions(shape=shape, delays=stale))
    assert one.ttft_p90_s < late.ttft_p90_s

"""The index with its delays, KV links, and ideal caches."""

from __future__ import annotations

import pytest

from phloem.shared.engine.kv_pool import OwnerKey
from phloem.shared.engine.requests import Request
from phloem.shared.protocol.session import SamplingParams, Submit
from phloem.simulate.events import EventQueue
from phloem.simulate.index import SimIndex
from phloem.simulate.kv_sender import KvSender
from phloem.simulate.oracle import lru_hit_rate
from phloem.simulate.workload import SimRequest

CHAIN = [bytes([n]) * 16 for n in range(5)]


def _run(events: EventQueue, until_s: float) -> None:
    events.at(until_s, lambda: None)
    events.run(lambda: events.now_s >= until_s)


def test_a_published_block_is_seen_after_the_lag() -> None:
    events = EventQueue()
    index = SimIndex(events, 3, 0.5, 5.0)
    index.publish(1, CHAIN[:3], [])
    index.publish(2, CHAIN, [])
    _run(events, 0.4)
    assert index.match(CHAIN) == {}
    _run(events, 0.6)
    assert index.match(CHAIN) == {1: 3, 2: 5}
    index.publish(2, [], CHAIN[2:])
    index.publish(1, [], CHAIN[:3])
    _run(events, 2.0)
    assert index.match(CHAIN) == {2: 2}
    assert index.num_blocks == 2


def test_an_announcement_is_seen_after_the_lag_and_runs_out() -> None:
    events = EventQueue()
    index = SimIndex(events, 3, 0.5, 5.0)
    index.announce(2, CHAIN[:4])
    assert index.announced(CHAIN) == {}
    _run(events, 0.6)
    assert index.announced(CHAIN) == {2: 4}
    _run(events, 5.6)
    assert index.announced(CHAIN) == {}


class _Link:
    """A sender of 10 units a second, and when each request's KV was there."""

    def __init__(self) -> None:
        self.events = EventQueue()
        self.arrived: dict[OwnerKey, float] = {}
        self.sender = KvSender(self.events, 1, 10.0, 0.25, self._on_sent)

    def _on_sent(self, key: OwnerKey, units: list[int]) -> None:
        self.arrived[key] = self.events.now_s

    def run(self) -> None:
        self.events.run(lambda: False)


def _request(name: str) -> Request:
    submit = Submit(
        request_id=name,
        attempt=1,
        epoch=1,
        phase="prefill",
        token_ids=[1] * 20,
        num_prompt_tokens=20,
        sampling=SamplingParams(max_tokens=4),
    )
    return Request(submit, gateway=0, order=1, eos_token_ids=(), context_length=1000, now_s=0.0)


def test_kv_leaves_as_it_is_computed_and_only_what_decode_lacks() -> None:
    link, request = _Link(), _request("a")
    link.sender.ready(request.key, 4)  # before the submission is here
    link.sender.begin(request)
    link.sender.computed(request.key, 10)  # 6 units: until 0.6 s
    link.events.at(2.0, lambda: link.sender.computed(request.key, 20))  # 10 units: until 3.0 s
    link.events.at(2.0, lambda: link.sender.made(request.key, [7]))
    link.run()
    assert link.arrived[request.key] == pytest.approx(3.25)
    assert link.sender.num_units_sent == 16
    assert link.sender.is_empty


def test_one_link_serves_one_after_the_other() -> None:
    link, first, second = _Link(), _request("a"), _request("b")
    for request in (first, second):
        link.sender.begin(request)
        link.sender.ready(request.key, 0)
        link.sender.computed(request.key, 20)
        link.sender.made(request.key, [7])
    link.run()
    assert link.arrived == {first.key: pytest.approx(2.25), second.key: pytest.approx(4.25)}


def test_a_request_held_in_vain_is_in_the_way_once_another_starves() -> None:
    link, starved, held = _Link(), _request("a"), _request("b")
    link.sender.begin(starved)
    link.sender.ready(starved.key, 0)
    link.sender.begin(held)
    link.sender.made(held.key, [7])
    assert link.sender.in_the_way(lambda request: True) is None
    link.events.at(1.5, lambda: None)
    link.run()
    assert link.sender.in_the_way(lambda request: True) == held.key
    assert link.sender.in_the_way(lambda request: False) is None


def _requests(*contents: list[int]) -> list[SimRequest]:
    return [SimRequest(n, float(n), 512 * len(c), 1, c) for n, c in enumerate(contents)]


def test_the_infinite_cache_hits_all_but_the_last_token_of_what_was_there() -> None:
    requests = _requests([1, 2], [1, 3], [1, 2])
    assert lru_hit_rate(requests, None) == (512 + 1023) / (6 * 512)


def test_the_lru_cache_forgets_the_longest_unused_and_the_ends_of_prefixes_first() -> None:
    requests = _requests([1, 2], [3], [1, 2])
    assert lru_hit_rate(requests, 2 * 512) == 512 / (5 * 512)  # 3 took the place of 2, not of 1
    assert lru_hit_rate(requests, 3 * 512) == 1023 / (5 * 512)

"""What was sent where a moment ago."""

from __future__ import annotations

from phloem.services.gateway.cluster.recent_placements import RecentPlacements
from phloem.shared.protocol.session import PeerRef

A, B = PeerRef("a", 1), PeerRef("b", 1)


def blocks(*names: str) -> list[bytes]:
    return [name.encode() for name in names]


def test_longest_known_prefix_names_its_worker() -> None:
    recent = RecentPlacements(lambda: 0.0)
    recent.note(blocks("1", "2", "3"), A)
    recent.note(blocks("1", "x"), B)
    assert recent.cached_tokens(blocks("1", "2", "3", "4")) == {A: 192}
    assert recent.cached_tokens(blocks("1", "x", "y")) == {B: 128}
    assert recent.cached_tokens(blocks("1")) == {B: 64}
    assert recent.cached_tokens(blocks("z")) == {}
    assert recent.cached_tokens([]) == {}


def test_placements_are_forgotten_after_a_while() -> None:
    now = 0.0
    recent = RecentPlacements(lambda: now, ttl_s=10.0)
    recent.note(blocks("1"), A)
    now = 9.9
    assert recent.cached_tokens(blocks("1")) == {A: 64}
    now = 10.1
    assert recent.cached_tokens(blocks("1")) == {}


def test_oldest_placements_make_room() -> None:
    recent = RecentPlacements(lambda: 0.0, max_blocks=2)
    recent.note(blocks("1"), A)
    recent.note(blocks("2", "3"), B)
    assert recent.cached_tokens(blocks("1")) == {}
    assert recent.cached_tokens(blocks("2", "3")) == {B: 128}

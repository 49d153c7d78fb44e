"""The page pool: every page has exactly one owner, and the audit can tell."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from phloem.shared.engine.kv_pool import KVPool, OwnerKey


class PoolMachine(RuleBasedStateMachine):
    """Random life of pages against a model of who owns what."""

    @initialize(num_pages=st.integers(1, 40))
    def start(self, num_pages: int) -> None:
        self.pool = KVPool(num_pages)
        self.requests: dict[OwnerKey, list[int]] = {}
        self.tree: list[int] = []

    @rule(n=st.integers(0, 12), name=st.sampled_from("abcde"))
    def allocate(self, n: int, name: str) -> None:
        if n <= self.pool.num_free_pages:
            self.requests.setdefault((name, 1), []).extend(self.pool.allocate(n, (name, 1)))

    @rule(name=st.sampled_from("abcde"), keep=st.integers(0, 5))
    def release(self, name: str, keep: int) -> None:
        pages = self.requests.pop((name, 1), [])
        self.pool.give_to_tree(pages[:keep], (name, 1))
        self.tree += pages[:keep]
        self.pool.release(pages[keep:], (name, 1))

    @rule(n=st.integers(0, 8))
    def evict(self, n: int) -> None:
        self.pool.reclaim(self.tree[:n])
        del self.tree[:n]

    @invariant()
    def every_page_has_one_owner(self) -> None:
        assert self.pool.audit(self.tree, self.requests) == []
        used = sum(map(len, self.requests.values())) + len(self.tree)
        assert self.pool.num_free_pages + used == self.pool.num_pages


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_double_release_is_caught() -> None:
    pool = KVPool(4)
    pages = pool.allocate(2, ("a", 1))
    pool.release(pages, ("a", 1))
    with pytest.raises(AssertionError, match="belongs to"):
        pool.release(pages, ("a", 1))


def test_release_of_anothers_page_is_caught() -> None:
    pool = KVPool(4)
    pages = pool.allocate(1, ("a", 1))
    with pytest.raises(AssertionError):
        pool.give_to_tree(pages, ("b", 1))


def test_audit_names_a_leaked_and_a_doubly_claimed_page() -> None:
    pool = KVPool(3)
    pages = pool.allocate(2, ("a", 1))
    assert any("leaked" in problem for problem in pool.audit([], {("a", 1): pages[:1]}))
    problems = pool.audit(pages[:1], {("a", 1): pages})
    assert any("claimed by the radix tree" in problem for problem in problems)
    assert any("2 times" in problem for problem in pool.audit([], {("a", 1): [*pages, pages[0]]}))

"""The radix tree against a model: exact matches, locks, LRU eviction, block events."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from phloem.shared.block_hash import BlockHasher
from phloem.shared.engine.radix_node import Node
from phloem.shared.engine.radix_tree import RadixTree

HASHER = BlockHasher(b"test")
PAGE = 16


def pages_of(count: int, first: int) -> list[int]:
    return list(range(first, first + count))


class TreeMachine(RuleBasedStateMachine):
    """The model: for each salt, the set of stored page-aligned prefixes, each with its page id."""

    @initialize(page_size=st.sampled_from([1, 4, 16, 64]))
    def start(self, page_size: int) -> None:
        self.size = page_size
        self.tree = RadixTree(page_size)
        self.model: dict[tuple[str, tuple[int, ...]], int] = {}
        self.locked: list[tuple[Node, str, tuple[int, ...]]] = []
        self.blocks: set[bytes] = set()
        self.next_page = 0

    def tokens(self, path: list[int], extra: int) -> list[int]:
        """Blocks of 64 equal tokens, each chosen from few, so that paths share prefixes; then a cut."""
        tokens = [token for choice in path for token in [choice] * 64]
        return tokens[: max(0, len(tokens) - extra)]

    paths = st.lists(st.integers(0, 2), min_size=0, max_size=4)

    @rule(path=paths, extra=st.integers(0, 130), salt=st.sampled_from(["", "s"]))
    def insert(self, path: list[int], extra: int, salt: str) -> None:
        tokens = self.tokens(path, extra)
        tokens = tokens[: len(tokens) // self.size * self.size]
        count = len(tokens) // self.size
        pages = pages_of(count, self.next_page)
        self.next_page += count
        expected = self.model_match(tokens, salt)
        result = self.tree.insert(tokens, pages, salt, HASHER.chain(tokens, salt))
        assert result.num_existing_pages == len(expected)
        for i in range(len(expected), count):
            self.model[salt, tuple(tokens[: (i + 1) * self.size])] = pages[i]

    @rule(path=paths, extra=st.integers(0, 130), salt=st.sampled_from(["", "s"]), keep=st.booleans())
    def match(self, path: list[int], extra: int, salt: str, keep: bool) -> None:
        tokens = self.tokens(path, extra)
        expected = self.model_match(tokens, salt)
        assert self.tree.num_matching_pages(tokens, salt) == len(expected)
        found = self.tree.match(tokens, salt)
        assert found.page_ids == expected
        if keep:
            self.tree.lock(found.node)
            self.locked.append((found.node, salt, tuple(tokens[: len(expected) * self.size])))

    @rule(which=st.integers(0, 50))
    def unlock(self, which: int) -> None:
        if self.locked:
            node, _, _ = self.locked.pop(which % len(self.locked))
            self.tree.unlock(node)

    @rule(n=st.integers(0, 20))
    def evict(self, n: int) -> None:
        evictable = self.tree.num_evictable_pages
        freed = set(self.tree.evict(n))
        assert len(freed) == min(n, evictable)
        locked = {page for _, salt, tokens in self.locked for page in self.model_match(list(tokens), salt)}
        assert not freed & locked, "a locked page was evicted"
        assert freed <= set(self.model.values())
        self.model = {key: page for key, page in self.model.items() if page not in freed}

    @rule()
    def take_events(self) -> None:
        stored, removed = self.tree.take_events()
        assert not set(stored) & self.blocks
        assert set(removed) <= self.blocks
        self.blocks = (self.blocks | set(stored)) - set(removed)
        held = {
            HASHER.chain(tokens, salt)[-1] for salt, tokens in self.model if tokens and len(tokens) % 64 == 0
        }
        assert self.blocks == held == set(self.tree.block_hashes())

    @invariant()
    def counts_agree(self) -> None:
        assert self.tree.audit() == []
        assert sorted(self.tree.page_ids()) == sorted(self.model.values())
        assert self.tree.num_salts == len({salt for salt, _ in self.model})

    def model_match(self, tokens: list[int], salt: str) -> list[int]:
        pages: list[int] = []
        for end in range(self.size, len(tokens) + 1, self.size):
            page = self.model.get((salt, tuple(tokens[:end])))
            if page is None:
                break
            pages.append(page)
        return pages


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_least_recently_used_leaf_goes_first() -> None:
    tree = RadixTree(PAGE)
    tree.insert([1] * 32, [0, 1])
    tree.insert([2] * 32, [2, 3])
    tree.match([1] * 32)
    assert tree.evict(1) == [3]
    assert tree.evict(1) == [2]
    assert tree.num_matching_pages([1] * 32) == 2


def test_match_is_by_tokens_of_this_salt_only() -> None:
    tree = RadixTree(PAGE)
    tree.insert([1] * 32, [0, 1], "tenant a")
    assert tree.match([1] * 32, "tenant b").page_ids == []
    assert tree.match([1] * 32, "tenant a").page_ids == [0, 1]


def test_partial_page_never_matches() -> None:
    tree = RadixTree(PAGE)
    tree.insert([1] * 32, [0, 1])
    assert tree.match([1] * 31).page_ids == [0]
    assert tree.match([1] * 31, max_pages=0).page_ids == []


def test_split_keeps_a_locked_node_locked() -> None:
    tree = RadixTree(PAGE)
    node = tree.insert([1] * 64, [0, 1, 2, 3]).node
    tree.lock(node)
    tree.insert([1] * 32 + [2] * 16, [8, 9, 10])
    assert tree.evict(10) == [10]
    tree.unlock(node)
    assert sorted(tree.evict(10)) == [0, 1, 2, 3]


def test_unlock_without_lock_is_caught() -> None:
    tree = RadixTree(PAGE)
    node = tree.insert([1] * 16, [0]).node
    with pytest.raises(AssertionError, match="unlock without lock"):
        tree.unlock(node)

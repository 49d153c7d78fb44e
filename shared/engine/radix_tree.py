"""A page-granular radix tree over token ids: which KV pages hold which prefix.

Pure Python, no torch. Edges hold whole pages, and a match is by exact tokens, never by hash. Each
`cache_salt` has a root of its own, so that salts never share. A node that a request uses is locked together
with its ancestors; only unlocked leaves are evicted, least recently used first, from their tail. (After
RadixAttention, Zheng et al. 2024, https://arxiv.org/abs/2312.07104.)

    root --[p0 p1 p2]--> A --[p3]--> B      A.tokens: 3 pages of tokens, A.page_ids: 3 pages
                          `--[p3']-> C      a split keeps the node objects of the deeper part

The tree also carries the names (block hashes) of the 64-token blocks it holds, as opaque values: a block
belongs to the node that holds its last token. What was stored and removed since the last
`take_events` is what the cluster's index is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from phloem.shared.block_hash import BLOCK_TOKENS
from phloem.shared.engine.block_changes import BlockChanges, TreeEvents
from phloem.shared.engine.radix_leaves import EvictableLeaves
from phloem.shared.engine.radix_node import Node


class Match(NamedTuple):
    """`page_ids` hold the KV of the first `len(page_ids) * page_size` tokens; `node` is where they end."""

    node: Node
    page_ids: list[int]


class Inserted(NamedTuple):
    """`num_existing_pages` leading pages were in the tree before: the caller keeps its own copies of those;
    the tree owns the rest of what was given."""

    node: Node
    num_existing_pages: int


class RadixTree:
    """Owns the nodes; `page_size` must divide 64."""

    def __init__(self, page_size: int) -> None:
        assert BLOCK_TOKENS % page_size == 0
        self.page_size = page_size
        self.num_pages = 0
        self.num_locked_pages = 0
        self._roots: dict[str, Node] = {}
        self._clock = 0
        self._leaves = EvictableLeaves()
        self._changes = BlockChanges()

    @property
    def num_evictable_pages(self) -> int:
        return self.num_pages - self.num_locked_pages

    # -- look up ---------------------------------------------------------------------------------------

    def match(self, token_ids: Sequence[int], salt: str = "", *, max_pages: int | None = None) -> Match:
        """The longest stored prefix in whole pages, at most `max_pages`; marks it as just used.

        The path may be split so that `node` ends exactly where the match does. Lock the node before
        anything is evicted.
        """
        limit = len(token_ids) // self.page_size
        if max_pages is not None:
            limit = min(limit, max_pages)
        self._clock += 1
        # A look-up alone registers no root: salts come and go, and each would leave one behind.
        node = self._roots.get(salt) or Node(None, [], [], 0)
        page_ids: list[int] = []
        while len(page_ids) < limit:
            child = node.children.get(self._page_key(token_ids, len(page_ids)))
            if child is None:
                break
            shared = self._shared_pages(child, token_ids, len(page_ids), limit)
            if shared < len(child.page_ids):
                child = self._split(child, shared)
            page_ids.extend(child.page_ids)
            node = child
            self._touch(node)
        return Match(node, page_ids)

    def num_matching_pages(self, token_ids: Sequence[int], salt: str = "") -> int:
        """How many leading pages are stored; changes nothing."""
        node = self._roots.get(salt)
        limit = len(token_ids) // self.page_size
        count = 0
        while node is not None and count < limit:
            child = node.children.get(self._page_key(token_ids, count))
            if child is None:
                break
            shared = self._shared_pages(child, token_ids, count, limit)
            count += shared
            if shared < len(child.page_ids):
                break
            node = child
        return count

    # -- change ----------------------------------------------------------------------------------------

    def insert(
        self,
        token_ids: Sequence[int],
        page_ids: Sequence[int],
        salt: str = "",
        block_hashes: Sequence[bytes] = (),
    ) -> Inserted:
        """Stores `page_ids` as the KV of `token_ids` (exactly `len(page_ids)` pages of tokens).

        `block_hashes` name the leading full blocks of `token_ids`; blocks past their end are not announced.
        """
        assert len(token_ids) == len(page_ids) * self.page_size
        found = self.match(token_ids, salt)
        existing = len(found.page_ids)
        node = found.node
        if existing < len(page_ids):
            if node.parent is None:
                node = self._roots.setdefault(salt, node)
            node = self._append(node, token_ids, list(page_ids[existing:]), existing, block_hashes)
        return Inserted(node, existing)

    def lock(self, node: Node) -> None:
        """Protects `node` and its ancestors from eviction until the matching `unlock`."""
        while node.parent is not None:
            if node.lock_count == 0:
                self.num_locked_pages += len(node.page_ids)
            node.lock_count += 1
            node = node.parent

    def unlock(self, node: Node) -> None:
        while node.parent is not None:
            assert node.lock_count > 0, "unlock without lock"
            node.lock_count -= 1
            if node.lock_count == 0:
                self.num_locked_pages -= len(node.page_ids)
                self._leaves.offer(node, self.num_pages)
            node = node.parent

    def evict(self, num_pages: int) -> list[int]:
        """Frees up to `num_pages` pages of unlocked leaves, least recently used first; returns them."""
        freed: list[int] = []
        while len(freed) < num_pages:
            leaf = self._leaves.pop()
            if leaf is None:
                break
            freed += self._trim(leaf, num_pages - len(freed))
        return freed

    # -- what others are told --------------------------------------------------------------------------

    def take_events(self) -> TreeEvents:
        """Net changes since the last call; no block is in both lists."""
        return self._changes.take()

    def block_hashes(self) -> list[bytes]:
        """All blocks held now, parents before children."""
        return [block for node in self._nodes() for block in node.block_hashes]

    def page_ids(self) -> list[int]:
        """All pages held now, for the audit."""
        return [page for node in self._nodes() for page in node.page_ids]

    @property
    def num_salts(self) -> int:
        """Salts under which something is stored."""
        return len(self._roots)

    def num_locked_nodes(self) -> int:
        return sum(node.lock_count > 0 for node in self._nodes())

    def audit(self) -> list[str]:
        """Checks the tree's own counts and shape; empty when all is well."""
        problems: list[str] = []
        pages = locked = 0
        for node in self._nodes():
            pages += len(node.page_ids)
            locked += len(node.page_ids) if node.lock_count else 0
            if len(node.tokens) != len(node.page_ids) * self.page_size or not node.page_ids:
                problems.append("a node's tokens and pages disagree")
            if node.lock_count < sum(child.lock_count for child in node.children.values()):
                problems.append("a node is locked less than its children")
        if pages != self.num_pages:
            problems.append(f"the tree counts {self.num_pages} pages and holds {pages}")
        if locked != self.num_locked_pages:
            problems.append(f"the tree counts {self.num_locked_pages} locked pages and holds {locked}")
        return problems

    # -- inside ----------------------------------------------------------------------------------------

    def _nodes(self) -> Iterator[Node]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None:
                yield node

    def _page_key(self, token_ids: Sequence[int], page: int) -> tuple[int, ...]:
        return tuple(token_ids[page * self.page_size : (page + 1) * self.page_size])

    def _shared_pages(self, node: Node, token_ids: Sequence[int], first_page: int, limit: int) -> int:
        """Leading pages of the node's edge that equal `token_ids` from `first_page` on; at least one."""
        size = self.page_size
        count = min(len(node.page_ids), limit - first_page)
        start = first_page * size
        if node.tokens[: count * size] == list(token_ids[start : start + count * size]):
            return count
        low, high = 1, count  # pages known equal; pages known to differ somewhere before
        while high - low > 1:
            middle = (low + high) // 2
            if node.tokens[: middle * size] == list(token_ids[start : start + middle * size]):
                low = middle
            else:
                high = middle
        return low

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cuts the edge after `num_pages`; returns the new upper node. `node` stays the deeper part."""
        parent = node.parent
        assert parent is not None
        cut = num_pages * self.page_size
        upper = Node(parent, node.tokens[:cut], node.page_ids[:num_pages], node.start_tokens + cut)
        blocks = upper.depth_tokens // BLOCK_TOKENS - upper.start_tokens // BLOCK_TOKENS
        upper.block_hashes, node.block_hashes = node.block_hashes[:blocks], node.block_hashes[blocks:]
        upper.lock_count = node.lock_count
        upper.last_used = node.last_used
        parent.children[self._page_key(upper.tokens, 0)] = upper
        node.parent = upper
        node.tokens = node.tokens[cut:]
        node.page_ids = node.page_ids[num_pages:]
        upper.children[self._page_key(node.tokens, 0)] = node
        return upper

    def _append(
        self,
        parent: Node,
        token_ids: Sequence[int],
        page_ids: list[int],
        first_page: int,
        block_hashes: Sequence[bytes],
    ) -> Node:
        node = Node(parent, list(token_ids[first_page * self.page_size :]), page_ids, len(token_ids))
        first_block = node.start_tokens // BLOCK_TOKENS
        node.block_hashes = list(block_hashes[first_block : node.depth_tokens // BLOCK_TOKENS])
        parent.children[self._page_key(node.tokens, 0)] = node
        self.num_pages += len(page_ids)
        self._changes.store(node.block_hashes)
        self._touch(node)
        return node

    def _touch(self, node: Node) -> None:
        node.last_used = self._clock
        self._leaves.offer(node, self.num_pages)

    def _trim(self, leaf: Node, num_pages: int) -> list[int]:
        """Takes up to `num_pages` pages off the end of a leaf; an empty leaf is removed."""
        parent = leaf.parent
        assert parent is not None
        keep = max(0, len(leaf.page_ids) - num_pages)
        freed = leaf.page_ids[keep:]
        key = self._page_key(leaf.tokens, 0)
        self.num_pages -= len(freed)
        leaf.depth_tokens = leaf.start_tokens + keep * self.page_size
        del leaf.page_ids[keep:], leaf.tokens[keep * self.page_size :]
        num_blocks = leaf.depth_tokens // BLOCK_TOKENS - leaf.start_tokens // BLOCK_TOKENS
        self._changes.remove(leaf.block_hashes[num_blocks:])
        del leaf.block_hashes[num_blocks:]
        if keep:
            self._leaves.offer(leaf, self.num_pages)
        else:
            del parent.children[key]
            leaf.parent = None
            if parent.parent is None and not parent.children:
                self._roots = {salt: root for salt, root in self._roots.items() if root is not parent}
            self._leaves.offer(parent, self.num_pages)
        return freed

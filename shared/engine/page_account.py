"""Moves pages between the pool, the radix tree and requests; the one place that touches all three."""

from __future__ import annotations

from phloem.shared.block_hash import BLOCK_TOKENS, BlockHasher
from phloem.shared.engine.kv_pool import KVPool
from phloem.shared.engine.radix_node import Node
from phloem.shared.engine.radix_tree import RadixTree
from phloem.shared.engine.requests import Request


class PageAccount:
    """Pages for requests: matched in the tree, allocated (evicting if need be), given back."""

    def __init__(self, pool: KVPool, tree: RadixTree, hasher: BlockHasher, *, reuse: bool = True) -> None:
        self.pool = pool
        self.tree = tree
        self._hasher = hasher
        self._reuse = reuse
        self._size = tree.page_size

    @property
    def num_available_pages(self) -> int:
        return self.pool.num_free_pages + self.tree.num_evictable_pages

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._size)

    def borrow_prefix(self, request: Request, max_tokens: int) -> None:
        """Locks the longest stored prefix of at most `max_tokens` for a request without pages."""
        assert not request.page_ids and request.node is None
        limit = max_tokens // self._size if self._reuse else 0
        found = self.tree.match(request.token_ids, request.salt, max_pages=limit)
        self.tree.lock(found.node)
        request.node = found.node
        request.page_ids = list(found.page_ids)
        request.num_tree_pages = len(found.page_ids)
        request.num_computed_tokens = len(found.page_ids) * self._size
        request.inserted_tokens = request.num_computed_tokens

    def return_prefix(self, request: Request) -> None:
        """Undoes `borrow_prefix` for a request that got nothing else."""
        assert len(request.page_ids) == request.num_tree_pages
        self._unlock(request)
        request.page_ids = []
        request.num_tree_pages = request.num_computed_tokens = request.inserted_tokens = 0

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Gives the request pages for its first `num_tokens` tokens; False (and no change) when even
        eviction can't make room."""
        missing = self.pages_for(num_tokens) - len(request.page_ids)
        if missing <= 0:
            return True
        if missing > self.num_available_pages:
            return False
        shortage = missing - self.pool.num_free_pages
        if shortage > 0:
            self.pool.reclaim(self.tree.evict(shortage))
        request.page_ids += self.pool.allocate(missing, request.key)
        return True

    def share_prefix(self, request: Request) -> None:
        """Offers the request's full, computed pages to the tree while it runs, so that others match them.

        When another request stored the same prefix meanwhile, this one keeps its own copies: page ids of a
        running request never change.
        """
        if not self._reuse:
            return
        num_tokens = self._num_storable_tokens(request)
        if num_tokens <= request.inserted_tokens:
            return
        request.inserted_tokens = num_tokens
        tokens = request.token_ids[:num_tokens]
        if self.tree.num_matching_pages(tokens, request.salt) != request.num_tree_pages:
            return
        num_pages = num_tokens // self._size
        inserted = self._insert(request, tokens, num_pages)
        self.pool.give_to_tree(request.page_ids[request.num_tree_pages : num_pages], request.key)
        self.tree.lock(inserted)
        self._unlock(request)
        request.node = inserted
        request.num_tree_pages = num_pages

    def give_back(self, request: Request) -> None:
        """The request lets go of all its pages: full computed ones stay in the tree for reuse, the rest is
        free at once. `num_computed_tokens` becomes zero."""
        if request.node is None:
            return
        stored = request.num_tree_pages
        if self._reuse:
            num_tokens = self._num_storable_tokens(request)
            num_pages = num_tokens // self._size
            if num_pages > request.num_tree_pages:
                stored = self._store_tail(request, num_tokens, num_pages)
        self.pool.release(request.page_ids[stored:], request.key)
        self._unlock(request)
        request.page_ids = []
        request.num_tree_pages = request.num_computed_tokens = request.inserted_tokens = 0

    def flush(self) -> int:
        """Evicts everything that no request holds; returns the number of pages."""
        page_ids = self.tree.evict(self.tree.num_evictable_pages)
        self.pool.reclaim(page_ids)
        return len(page_ids)

    def audit(self, requests: list[Request]) -> list[str]:
        """Every page has one owner, every lock a holder."""
        held = {request.key: request.own_page_ids for request in requests if request.page_ids}
        problems = self.pool.audit(self.tree.page_ids(), held) + self.tree.audit()
        holders = sum(request.node is not None and request.node.parent is not None for request in requests)
        if self.tree.num_locked_nodes() and not holders:
            problems.append("the tree has locked nodes and no request holds one")
        return problems

    # -- inside ----------------------------------------------------------------------------------------

    def _num_storable_tokens(self, request: Request) -> int:
        """Tokens in full pages whose KV is written and whose ids are known."""
        return min(request.num_computed_tokens, len(request.token_ids)) // self._size * self._size

    def _store_tail(self, request: Request, num_tokens: int, num_pages: int) -> int:
        """Gives the tree what it lacks of the first `num_pages`; releases duplicates. Returns `num_pages`."""
        tokens = request.token_ids[:num_tokens]
        existing = self.tree.num_matching_pages(tokens, request.salt)
        first_new = max(existing, request.num_tree_pages)
        self._insert(request, tokens, num_pages)
        self.pool.release(request.page_ids[request.num_tree_pages : first_new], request.key)
        self.pool.give_to_tree(request.page_ids[first_new:num_pages], request.key)
        return num_pages

    def _insert(self, request: Request, tokens: list[int], num_pages: int) -> Node:
        request.block_hashes = self._hasher.chain(
            tokens, request.salt, known=request.block_hashes[: len(tokens) // BLOCK_TOKENS]
        )
        return self.tree.insert(tokens, request.page_ids[:num_pages], request.salt, request.block_hashes).node

    def _unlock(self, request: Request) -> None:
        assert request.node is not None
        self.tree.unlock(request.node)
        request.node = None

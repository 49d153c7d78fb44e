"""Who owns each KV page. Pure bookkeeping: no torch, no tensors.

Every page has exactly one owner at any time:

    free list --allocate--> request --give_to_tree--> radix tree --reclaim--> free list
                               `-------release------> free list

The pool is told of every change by the one who makes it, so that `audit` can compare three independent
accounts: the pool's own, the tree's, and the requests'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

OwnerKey: TypeAlias = tuple[str, int]  # (request_id, attempt)

_FREE: OwnerKey = ("", 0)
_TREE: OwnerKey = ("", 1)


class KVPool:
    """Page ids 0 .. num_pages - 1 and their owners. Misuse is a bug of ours and fails an assertion."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._owner: list[OwnerKey] = [_FREE] * num_pages
        # Popped from the end: ascending ids first, so that a request's pages tend to be neighbours.
        self._free: list[int] = list(range(num_pages - 1, -1, -1))

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def allocate(self, num_pages: int, owner: OwnerKey) -> list[int]:
        """Takes free pages for a request; the caller has checked `num_free_pages`."""
        assert num_pages <= len(self._free), "allocate without checking num_free_pages"
        if num_pages == 0:
            return []
        page_ids = self._free[-num_pages:][::-1]
        del self._free[-num_pages:]
        for page in page_ids:
            self._owner[page] = owner
        return page_ids

    def release(self, page_ids: Sequence[int], owner: OwnerKey) -> None:
        """A request gives pages back to the free list."""
        self._move(page_ids, owner, _FREE)
        self._free.extend(reversed(page_ids))

    def give_to_tree(self, page_ids: Sequence[int], owner: OwnerKey) -> None:
        """A request's pages become the radix tree's."""
        self._move(page_ids, owner, _TREE)

    def reclaim(self, page_ids: Sequence[int]) -> None:
        """The tree evicted these pages: back to the free list."""
        self._move(page_ids, _TREE, _FREE)
        self._free.extend(reversed(page_ids))

    def _move(self, page_ids: Sequence[int], old: OwnerKey, new: OwnerKey) -> None:
        for page in page_ids:
            assert self._owner[page] == old, f"page {page} belongs to {self._owner[page]}, not to {old}"
            self._owner[page] = new

    def audit(self, tree_pages: Iterable[int], request_pages: Mapping[OwnerKey, Sequence[int]]) -> list[str]:
        """Compares the pool's account with the tree's and the requests'; empty when all agree.

        `request_pages` are the pages that each live request owns itself, without those it borrows from the
        tree.
        """
        claims: Counter[tuple[int, OwnerKey]] = Counter((page, _FREE) for page in self._free)
        claims.update((page, _TREE) for page in tree_pages)
        for key, page_ids in request_pages.items():
            claims.update((page, key) for page in page_ids)
        problems = [
            f"page {page} is claimed {count} times by {_name(owner)}"
            for (page, owner), count in claims.items()
            if count > 1
        ]
        for page, owner in claims:
            if self._owner[page] != owner:
                problems.append(
                    f"page {page} is claimed by {_name(owner)} but is {_name(self._owner[page])}'s"
                )
        claimed = {page for page, _ in claims}
        problems += [
            f"page {page} is leaked: recorded as {_name(self._owner[page])}'s, claimed by none"
            for page in range(self.num_pages)
            if page not in claimed
        ]
        return problems


def _name(owner: OwnerKey) -> str:
    if owner == _FREE:
        return "the free list"
    if owner == _TREE:
        return "the radix tree"
    return f"request {owner[0]}#{owner[1]}"

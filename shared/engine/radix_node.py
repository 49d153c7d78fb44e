"""One edge of the radix tree and its end."""

from __future__ import annotations


class Node:
    """Owned by the tree; others hold it only to lock and unlock. A root has no parent and no pages."""

    __slots__ = (
        "block_hashes",
        "children",
        "depth_tokens",
        "last_used",
        "lock_count",
        "page_ids",
        "parent",
        "tokens",
    )

    def __init__(
        self, parent: Node | None, tokens: list[int], page_ids: list[int], depth_tokens: int
    ) -> None:
        self.parent = parent
        self.tokens = tokens
        self.page_ids = page_ids
        self.depth_tokens = depth_tokens  # tokens from the root to the end of this node
        self.children: dict[tuple[int, ...], Node] = {}
        self.block_hashes: list[bytes] = []  # of blocks whose last token lies on this edge
        self.lock_count = 0
        self.last_used = 0

    @property
    def start_tokens(self) -> int:
        return self.depth_tokens - len(self.tokens)

    @property
    def is_evictable(self) -> bool:
        """An unlocked leaf of the tree, neither a root nor one that was removed."""
        return not (self.lock_count or self.children) and bool(self.page_ids) and self.parent is not None

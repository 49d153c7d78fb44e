"""What a worker's slot holds, its digest, and samples of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from phloem.shared.tree_digest import TreeDigest, digest_text
from phloem.shared.worker.published_tree import PublishedTree
from tests.support.index_replica import some_hash

BLOCKS = [some_hash(number) for number in range(30)]
SOME = st.lists(st.sampled_from(BLOCKS), max_size=12)


def digest_of(blocks: set[bytes]) -> tuple[int, int]:
    digest = TreeDigest()
    for block in blocks:
        digest.add(block)
    return digest.num_blocks, digest.value


@given(st.lists(st.tuples(SOME, SOME)))
def test_digest_is_that_of_the_set_whatever_led_to_it(changes: list[tuple[list[bytes], list[bytes]]]) -> None:
    tree = PublishedTree()
    model: set[bytes] = set()
    for stored, removed in changes:
        tree.apply(stored, removed)
        model = (model - set(removed)) | set(stored)
        assert (tree.digest.num_blocks, tree.digest.value) == digest_of(model)
        assert set(tree.sample(5)) <= model


def test_every_block_is_sampled_in_turn() -> None:
    tree = PublishedTree()
    tree.apply(BLOCKS, [])
    samples = [tree.sample(7) for _ in range(5)]
    assert [len(sample) for sample in samples] == [7, 7, 7, 7, 2]
    assert {block for sample in samples for block in sample} == set(BLOCKS)


def test_text_of_a_digest_has_a_fixed_width() -> None:
    assert digest_text(0, 0) == "0 0000000000000000"
    assert digest_text(12, 0xAB) == "12 00000000000000ab"

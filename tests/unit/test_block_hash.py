"""Block hashes: the names that all services must agree on, for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phloem.shared.block_hash import BLOCK_TOKENS, HASH_BYTES, BlockHasher

HASHER = BlockHasher(b"secret")
TOKENS = list(range(1000, 1000 + 3 * BLOCK_TOKENS))


def test_golden_values() -> None:
    """A change here makes every block in a running cluster unknown, and old and new services disagree."""
    chain = BlockHasher(b"phloem").chain(list(range(128)), "tenant")
    assert [block.hex() for block in chain] == [
        "55eb571fe22c61996daa2d6c6aefacc6",
        "ce19a87ee0d205583798fe69b8b267e9",
    ]


def test_only_full_blocks_have_a_hash() -> None:
    assert HASHER.chain([]) == []
    assert HASHER.chain(TOKENS[: BLOCK_TOKENS - 1]) == []
    assert len(HASHER.chain(TOKENS[: 2 * BLOCK_TOKENS + 1])) == 2
    assert {len(block) for block in HASHER.chain(TOKENS)} == {HASH_BYTES}


@given(st.lists(st.integers(0, 2**32 - 1), max_size=300), st.text(max_size=8), st.data())
def test_incremental_equals_full(tokens: list[int], salt: str, data: st.DataObject) -> None:
    full = HASHER.chain(tokens, salt)
    known = data.draw(st.integers(0, len(full)))
    assert HASHER.chain(tokens, salt, known=full[:known]) == full


@given(st.integers(0, 2 * BLOCK_TOKENS - 1), st.integers(0, 2**32 - 1))
def test_changed_token_changes_its_block_and_all_after_it(position: int, token: int) -> None:
    changed = [*TOKENS[:position], token, *TOKENS[position + 1 :]]
    before, after = HASHER.chain(TOKENS), HASHER.chain(changed)
    first = position // BLOCK_TOKENS
    assert before[:first] == after[:first]
    same = token == TOKENS[position]
    assert [a == b for a, b in zip(before[first:], after[first:], strict=True)] == [same] * (3 - first)


def test_equal_tokens_at_another_place_have_another_hash() -> None:
    block = TOKENS[:BLOCK_TOKENS]
    assert len(set(HASHER.chain(block * 3))) == 3


def test_salt_and_secret_separate() -> None:
    chains = [
        BlockHasher(b"secret").chain(TOKENS),
        BlockHasher(b"secret").chain(TOKENS, "tenant a"),
        BlockHasher(b"secret").chain(TOKENS, "tenant b"),
        BlockHasher(b"another").chain(TOKENS),
        BlockHasher(b"").chain(TOKENS),
    ]
    blocks = [block for chain in chains for block in chain]
    assert len(blocks) == len(set(blocks))


def test_known_hashes_of_a_longer_chain_are_cut() -> None:
    known = HASHER.chain(TOKENS)
    assert HASHER.chain(TOKENS[:BLOCK_TOKENS], known=known) == known[:1]


@pytest.mark.parametrize("token", [-1, 2**32])
def test_token_outside_32_bits_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        HASHER.chain([token] * BLOCK_TOKENS)

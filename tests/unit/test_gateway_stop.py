"""Stop strings and incremental detokenisation."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from phloem.services.gateway.text.detokenizer import Detokenizer
from phloem.services.gateway.text.stop import StopMatcher
from tests.support.gateway import END, encode


@pytest.fixture(scope="module")
def backend(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


def shown(matcher: StopMatcher, pieces: list[str]) -> str:
    text = ""
    for piece in pieces:
        text += matcher.push(piece)
        if matcher.matched is not None:
            return text
    return text + matcher.flush()


def test_stop_string_across_pieces_is_never_shown() -> None:
    matcher = StopMatcher(["</end>"])
    assert shown(matcher, ["one <", "/e", "nd", "> two"]) == "one "
    assert matcher.matched == "</end>"


def test_only_what_may_become_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["stop", "\n\n"])
    assert matcher.push("a st") == "a "
    assert matcher.push("ar\n") == "star"
    assert matcher.push("b") == "\nb"
    assert matcher.flush() == ""


def test_the_earliest_stop_wins_whatever_the_order_given() -> None:
    matcher = StopMatcher(["late", "early"])
    assert shown(matcher, ["x early late"]) == "x "
    assert matcher.matched == "early"


def test_held_text_is_returned_at_the_end() -> None:
    matcher = StopMatcher(["STOP"])
    assert shown(matcher, ["a ST", "O"]) == "a STO"
    assert matcher.matched is None


def test_nothing_is_returned_twice_after_a_stop() -> None:
    matcher = StopMatcher(["b"])
    assert matcher.push("ab") == "a"
    assert matcher.flush() == ""


@settings(deadline=None)
@given(
    st.text("abc", max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 5),
)
def test_any_split_shows_the_text_before_the_first_complete_stop(
    text: str, stops: list[str], size: int
) -> None:
    matcher = StopMatcher(stops)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    result = shown(matcher, pieces)
    if not any(stop in text for stop in stops):
        assert (result, matcher.matched) == (text, None)
        return
    # The first piece that completes a stop decides; within it the earliest one does.
    seen = ""
    for piece in pieces:
        seen += piece
        starts = [seen.find(stop) for stop in stops if stop in seen]
        if starts:
            assert result == seen[: min(starts)]
            return


def test_half_a_character_waits_for_its_other_half(model_dir: Path, backend: Tokenizer) -> None:
    detokenizer = Detokenizer(backend)
    pieces = [detokenizer.push(token_id) for token_id in encode(model_dir, "ö 👋🏽!")]
    assert "".join(pieces) == "ö 👋🏽!"
    assert not any("�" in piece for piece in pieces)
    assert detokenizer.flush() == ""


def test_half_a_character_at_the_end_is_flushed(model_dir: Path, backend: Tokenizer) -> None:
    detokenizer = Detokenizer(backend)
    ids = encode(model_dir, "a👋")
    pieces = [detokenizer.push(token_id) for token_id in ids[:-1]]
    assert "".join(pieces) == "a"
    assert detokenizer.flush() == "�"
    assert detokenizer.flush() == ""


def test_control_tokens_have_no_text_unless_wanted(backend: Tokenizer) -> None:
    assert Detokenizer(backend).push(END) == ""
    assert Detokenizer(backend, skip_special_tokens=False).push(END) == "<|im_end|>"


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_pieces_add_up_to_the_whole_text(backend: Tokenizer, ids: list[int]) -> None:
    detokenizer = Detokenizer(backend)
    text = "".join(detokenizer.push(token_id) for token_id in ids) + detokenizer.flush()
    assert text == backend.decode(ids, skip_special_tokens=True)


def byte_fallback_tokenizer() -> Tokenizer:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", "▁Paris", "▁is", "b"):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def id_of(tokenizer: Tokenizer, piece: str) -> int:
    token_id = tokenizer.token_to_id(piece)
    assert token_id is not None
    return token_id


def test_a_leading_space_is_kept_only_when_text_goes_on() -> None:
    tokenizer = byte_fallback_tokenizer()
    paris, is_, b = (id_of(tokenizer, piece) for piece in ("▁Paris", "▁is", "b"))
    assert Detokenizer(tokenizer).push(paris) == "Paris"
    assert Detokenizer(tokenizer, context=[b]).push(paris) == " Paris"
    anew = Detokenizer(tokenizer)
    assert anew.push(paris) + anew.push(is_) == "Paris is"


@settings(deadline=None)
@given(ids=st.lists(st.integers(3, 262), max_size=30))
def test_invalid_bytes_never_raise(ids: list[int]) -> None:
    detokenizer = Detokenizer(byte_fallback_tokenizer())
    for token_id in ids:
        detokenizer.push(token_id)
    assert isinstance(detokenizer.flush(), str)


def test_text_after_invalid_bytes_is_right_again() -> None:
    tokenizer = byte_fallback_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    b, is_ = id_of(tokenizer, "b"), id_of(tokenizer, "▁is")
    ids = [3 + 0x1C, 3 + 0xF0, 3 + 0xF1, 3 + 0xF2, b, is_, b]
    text = "".join(detokenizer.push(token_id) for token_id in ids) + detokenizer.flush()
    assert text.endswith("b isb")

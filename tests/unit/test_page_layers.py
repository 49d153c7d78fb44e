"""Which layers of which pages have gone: the sender's order is what the receiver accepts."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from phloem.shared.engine.page_layers import PageLayers, Span

LAYERS = 4
BYTES = 8  # of a page in one layer


def drain(sender: PageLayers, num_pages: int, layer_end: int, slot_bytes: int) -> list[Span]:
    spans = []
    while (run := sender.next_run(num_pages, layer_end)) is not None:
        spans.append(run.head(slot_bytes, BYTES))
        left = sender.num_left
        sender.note(spans[-1])
        assert sender.num_left == left - spans[-1].layers_of_pages()
    return spans


def test_pages_share_a_slot_and_go_group_by_group() -> None:
    sender = PageLayers(3, LAYERS, num_held=1)
    assert sender.num_left == 2 * LAYERS
    assert drain(sender, 3, 3, 100) == [Span(1, 2, 0, 3)]
    assert not sender.is_complete and sender.num_left == 2
    assert drain(sender, 3, LAYERS, 8) == [Span(1, 1, 3, 4), Span(2, 1, 3, 4)]
    assert sender.is_complete


def test_pages_of_a_later_chunk_follow() -> None:
    sender = PageLayers(4, LAYERS, num_held=0)
    assert drain(sender, 2, LAYERS, 64) == [Span(0, 2, 0, 4)]
    assert drain(sender, 4, 2, 64) == [Span(2, 2, 0, 2)]
    assert drain(sender, 4, LAYERS, 64) == [Span(2, 2, 2, 4)]


def test_page_larger_than_a_slot_goes_alone_by_layers() -> None:
    sender = PageLayers(2, LAYERS, num_held=0)
    assert drain(sender, 2, LAYERS, 24) == [
        Span(0, 1, 0, 3),
        Span(0, 1, 3, 4),
        Span(1, 1, 0, 3),
        Span(1, 1, 3, 4),
    ]


@example(num_pages=3, held=0, slot_bytes=BYTES, chunks=[(1, [2], True), (3, [1, 2], False)])
@given(
    num_pages=st.integers(1, 12),
    held=st.integers(0, 12),
    slot_bytes=st.integers(BYTES, 200),
    # A chunk: its pages, and the ends of its groups. Fewer pages than before: it was retracted.
    chunks=st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.integers(1, LAYERS), max_size=3), st.booleans()), max_size=5
    ),
)
def test_receiver_accepts_whatever_order_chunks_and_retractions_bring(
    num_pages: int, held: int, slot_bytes: int, chunks: list[tuple[int, list[int], bool]]
) -> None:
    sender = PageLayers(num_pages, LAYERS, min(held, num_pages))
    receiver = PageLayers(num_pages, LAYERS, min(held, num_pages))
    for pages, ends, cut_short in [*chunks, (num_pages, [], False)]:
        for end in [*sorted(set(ends)), *([] if cut_short else [LAYERS])]:
            for span in drain(sender, min(pages, num_pages), end, slot_bytes):
                assert span.num_pages * (span.layer_end - span.layer_start) * BYTES <= slot_bytes
                assert receiver.accepts(span)
                receiver.note(span)
    assert sender.is_complete and receiver.is_complete and sender.num_left == receiver.num_left == 0


@pytest.mark.parametrize(
    "span",
    [
        Span(0, 1, 0, 4),  # held
        Span(1, 1, 1, 4),  # its first layer is missing
        Span(2, 1, 0, 4),  # not its turn
        Span(1, 4, 0, 4),  # more than there are
        Span(-1, 1, 0, 4),
        Span(1, 0, 0, 4),
        Span(1, 1, 0, 5),
        Span(1, 1, 2, 2),
    ],
)
def test_what_is_not_next_is_not_accepted(span: Span) -> None:
    assert not PageLayers(4, LAYERS, num_held=1).accepts(span)


def test_the_same_again_is_not_accepted() -> None:
    pages = PageLayers(4, LAYERS, num_held=1)
    pages.note(Span(1, 2, 0, 4))
    assert not pages.accepts(Span(1, 2, 0, 4))
    assert not pages.accepts(Span(2, 2, 0, 4))
    assert pages.accepts(Span(3, 1, 0, 4))

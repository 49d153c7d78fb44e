"""The order in which an engine's thread gets its messages, also when it takes some of them early."""

from __future__ import annotations

import threading

from phloem.shared.engine.inbox import Inbox
from phloem.shared.protocol.engine import AuditRequest, DumpTree, FlushCache

A, B, C, D = FlushCache(1), AuditRequest(2), FlushCache(3), DumpTree(4)


def rest_of(inbox: Inbox) -> list[object]:
    items: list[object] = []
    while (item := inbox.next()) is not None:
        items.append(item)
    return items


def test_items_come_in_their_order_and_none_when_there_is_none() -> None:
    inbox = Inbox()
    assert inbox.next() is None
    for item in (A, B, C):
        inbox.deliver(item)
    assert rest_of(inbox) == [A, B, C]


def test_an_item_of_another_thread_ends_the_wait() -> None:
    inbox = Inbox()
    thread = threading.Thread(target=inbox.deliver, args=(A,))
    thread.start()
    assert inbox.next(wait_s=10.0) == A
    thread.join()
    assert inbox.next(wait_s=0.001) is None


def test_urgent_items_are_taken_up_to_the_first_that_is_not() -> None:
    inbox = Inbox()
    for item in (A, C, B, A, D):
        inbox.deliver(item)
    assert list(inbox.urgent((FlushCache,))) == [A, C]
    assert inbox.has_passed_over
    assert list(inbox.urgent((FlushCache,))) == [], "nothing overtakes what was passed over"
    inbox.deliver(C)
    assert rest_of(inbox) == [B, A, D, C]
    assert not inbox.has_passed_over


def test_what_comes_while_urgent_items_are_handled_is_looked_at_too() -> None:
    inbox = Inbox()
    inbox.deliver(A)
    taken = []
    for item in inbox.urgent((FlushCache,)):
        taken.append(item)
        if item == A:
            inbox.deliver(C)
    assert taken == [A, C]

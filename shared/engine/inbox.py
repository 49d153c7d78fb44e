"""What comes to the engine's thread: messages of its front and its transfers, in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TypeAlias

from phloem.shared.engine.engine_socket import FrontGone
from phloem.shared.engine.grammar.desk import GrammarReady
from phloem.shared.engine.prompt_queue import PromptQueue
from phloem.shared.protocol.engine import EngineMessage
from phloem.shared.transfer.events import TransferEvent

InboxItem: TypeAlias = EngineMessage | TransferEvent | GrammarReady | FrontGone


class Inbox:
    """Any thread may `deliver`; all else is for the one that takes."""

    def __init__(self) -> None:
        self._queue: PromptQueue[InboxItem] = PromptQueue()
        self._passed_over: deque[InboxItem] = deque()  # older than all in the queue

    @property
    def has_passed_over(self) -> bool:
        """Whether `urgent` left an item for `next`."""
        return bool(self._passed_over)

    def deliver(self, item: InboxItem) -> None:
        self._queue.put(item)

    def next(self, wait_s: float = 0.0) -> InboxItem | None:
        """The oldest item; None when there is none, or none comes within `wait_s` seconds."""
        if self._passed_over:
            return self._passed_over.popleft()
        return self._queue.get(wait_s)

    def urgent(self, kinds: tuple[type, ...]) -> Iterator[InboxItem]:
        """Takes the items of `kinds` that are here, up to the first of another kind: that and what comes
        after it keep their order for `next`."""
        while not self._passed_over and (item := self._queue.get()) is not None:
            if isinstance(item, kinds):
                yield item
            else:
                self._passed_over.append(item)

"""A device for `CudaStepRunner` on a CPU: as late as a device may be.

What a captured step asks for (copies, replays, marks) only stands in a queue until somebody asks for the
second time whether a mark was reached; then all before that mark is done, and nothing behind it. So a host
that touches what an earlier step has still to read makes wrong tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor


class LateDevice:
    """`DeviceCalls`; `asked` lists what was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.late = False  # from the first step on
        self._queue: deque[Callable[[], object]] = deque()

    def send(self, target: Tensor, source: Tensor) -> None:
        self.ask("send", lambda: target.copy_(source))

    def capture(self, forward: Callable[[], Tensor]) -> LateGraph:
        forward()
        return LateGraph(self, forward)

    def mark(self) -> LateMark:
        return LateMark(self)

    def ask(self, what: str, work: Callable[[], object]) -> None:
        self.asked.append(what)
        self._queue.append(work)
        if not self.late:
            self.finish()

    def finish(self) -> None:
        """All that was asked for; before something is computed at once."""
        self.finish_until(lambda: False)

    def finish_until(self, enough: Callable[[], bool]) -> None:
        while self._queue and not enough():
            self._queue.popleft()()


class LateGraph:
    def __init__(self, device: LateDevice, forward: Callable[[], Tensor]) -> None:
        self._device = device
        self._forward = forward
        self._logits: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """Whoever wants them launches something behind the replay."""
        self._device.finish()
        assert self._logits is not None
        return self._logits

    def replay(self) -> None:
        self._device.ask("replay", self._run)

    def _run(self) -> None:
        self._logits = self._forward()


class LateMark:
    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self._num_due = 0
        self._was_asked = False

    def record(self) -> None:
        assert not self._num_due, "it stands for a step that is not collected"
        self._num_due += 1
        self._was_asked = False
        self._device.ask("mark", self._reached)

    def query(self) -> bool:
        """Not the first time: so the next step is launched before this one begins."""
        if self._num_due and not self._was_asked:
            self._was_asked = True
            return False
        self.synchronize()
        return True

    def synchronize(self) -> None:
        self._device.finish_until(lambda: not self._num_due)
        assert not self._num_due, "nothing leads here"

    def _reached(self) -> None:
        self._num_due -= 1

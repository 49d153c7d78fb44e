"""Which processes run but do nothing any more: stopped, or stuck. Pure.

A service renews its registration every second, also while it drains, and gives it back only when it is about
to exit. One that was registered and is not any more, and runs on for long, hangs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

_LONGEST_PAUSE_S = 5.0  # between two looks: after a longer one nothing is known of the time between
# A registration outlives a process that dies by its lease, 3 s, and by as much again when Redis starts anew.
# Until then it may be the predecessor's, and who is still loading a model has none to lose.
_PREDECESSORS_S = 7.0


class Liveness:
    """Of the children of one supervisor, by name."""

    def __init__(self, hang_timeout_s: float) -> None:
        self._hang_timeout_s = hang_timeout_s
        # The processes, and since when they replace others.
        self._seen: dict[str, tuple[int | None, float]] = {}
        self._registered_pids: dict[str, int] = {}  # of those that have been seen registered
        self._missing_since_s: dict[str, float] = {}
        self._looked_at_s = 0.0

    def look_away(self) -> None:
        """The registry can't be read: nobody's absence counts."""
        self._missing_since_s.clear()

    def hung(self, pids: Mapping[str, int | None], registered: Collection[str], now_s: float) -> list[str]:
        """Those of the children that have been missing from the registry for the whole time-out, and are
        forgotten with that. `pids`: of those that run now; None: it is being started again."""
        if now_s - self._looked_at_s > _LONGEST_PAUSE_S:
            self.look_away()
        self._looked_at_s = now_s
        return [name for name, pid in pids.items() if self._hangs(name, pid, name in registered, now_s)]

    def _hangs(self, name: str, pid: int | None, is_registered: bool, now_s: float) -> bool:
        if self._seen.setdefault(name, (pid, float("-inf")))[0] != pid:
            self._seen[name] = pid, now_s
        if is_registered and pid is not None and now_s - self._seen[name][1] >= _PREDECESSORS_S:
            self._registered_pids[name] = pid
        if is_registered or pid is None or self._registered_pids.get(name) != pid:
            self._missing_since_s.pop(name, None)
            return False
        if now_s - self._missing_since_s.setdefault(name, now_s) < self._hang_timeout_s:
            return False
        del self._registered_pids[name], self._missing_since_s[name]
        return True

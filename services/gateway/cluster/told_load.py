"""Which word on a worker's load is the latest: its own over the session, or its heartbeat in the registry."""

from __future__ import annotations

import msgspec

from phloem.shared.protocol.cluster import WorkerLoad, WorkerRecord

FRESH_S = 2.0  # a heartbeat is at most a beat and a poll old: a load told before that is older


class ToldLoad:
    """The load that a worker told over its session."""

    def __init__(self) -> None:
        self._load: WorkerLoad | None = None
        self._until_s = 0.0

    def note(self, load: WorkerLoad, now_s: float) -> None:
        self._load = load
        self._until_s = now_s + FRESH_S

    def latest(self, heartbeat: WorkerRecord, now_s: float) -> WorkerRecord:
        """The record with the newer load."""
        if self._load is None or now_s >= self._until_s:
            return heartbeat
        return msgspec.structs.replace(heartbeat, load=self._load)

"""How equal workers are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from phloem.services.gateway.policies.snapshot import Candidate, RoutingRequest


class Draw:
    """A number for each worker: random over requests, the same for one attempt of one request wherever and in
    whatever order it is asked for. The lowest wins."""

    def __init__(self, request: RoutingRequest) -> None:
        self._seed = crc32(f"{request.request_id}\0{request.attempt}".encode())

    def of(self, worker: Candidate) -> int:
        """32 bits."""
        return _mixed(self._seed ^ crc32(worker.record.worker_id.encode()))

    def lowest(self, workers: Sequence[Candidate]) -> int:
        """Which of `workers` has the lowest number: its place among them."""
        if len(workers) == 1:
            return 0
        numbers = [self.of(worker) for worker in workers]
        return numbers.index(min(numbers))


def _mixed(number: int) -> int:
    """MurmurHash3's finalizer (Appleby, public domain): a CRC is linear, so that two workers' numbers would
    differ by the same bits at every request."""
    number = (number ^ number >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    number = (number ^ number >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return number ^ number >> 16

"""How equal workers are told apart."""

from __future__ import annotations

from zlib import crc32

from phloem.services.gateway.policies.snapshot import Candidate, RoutingRequest


class Draw:
    """A number for each worker: random over requests, the same for one attempt of one request wherever and in
    whatever order it is asked for. The lowest wins."""

    def __init__(self, request: RoutingRequest) -> None:
        self._seed = crc32(f"{request.request_id}\0{request.attempt}".encode())

    def of(self, worker: Candidate) -> int:
        # Integers hash alike in every process, and tuples of them mix well, which a bare CRC does not.
        return hash((self._seed, crc32(worker.record.worker_id.encode())))

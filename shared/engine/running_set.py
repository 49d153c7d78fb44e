"""Who runs: the requests that have a slot and compute, and who has which slot."""

from __future__ import annotations

from phloem.shared.engine.kv_pool import OwnerKey
from phloem.shared.engine.requests import Request


class Slots:
    """Slot numbers 0 .. num_slots - 1."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, request: Request) -> None:
        """The caller has checked `num_free`. The runner sets the slot up anew."""
        request.slot = self._free.pop()
        request.num_bound_pages = -1

    def release(self, request: Request) -> None:
        if request.slot >= 0:
            self._free.append(request.slot)
            request.slot = -1


class RunningSet:
    """Running requests in order of their start; retracted ones until their last step is collected.

    `version` changes with every change of the set. `num_missing_tokens`, of all of them: known tokens that
    no launched step computes; it is kept up to date by being told.
    """

    def __init__(self) -> None:
        self._requests: dict[OwnerKey, Request] = {}
        self.version = 0
        self.num_missing_tokens = 0

    def __len__(self) -> int:
        return len(self._requests)

    def requests(self) -> list[Request]:
        return list(self._requests.values())

    def youngest(self) -> Request:
        return max(self._requests.values(), key=lambda request: request.order)

    def add(self, request: Request) -> None:
        assert request.key not in self._requests
        self._requests[request.key] = request
        self.num_missing_tokens += _missing(request)
        self.version += 1

    def remove(self, request: Request) -> None:
        """Nothing happens when it is not in the set."""
        if self._requests.pop(request.key, None) is not None:
            self.num_missing_tokens -= _missing(request)
            self.version += 1

    def computing(self, num_tokens: int) -> None:
        """A step computes so many tokens of requests in the set."""
        self.num_missing_tokens -= num_tokens

    def made(self, num_tokens: int) -> None:
        """So many tokens were appended to requests in the set."""
        self.num_missing_tokens += num_tokens


def _missing(request: Request) -> int:
    return len(request.token_ids) - request.num_computed_tokens

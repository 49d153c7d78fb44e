"""Where recent requests went, and why."""

from __future__ import annotations

from collections import OrderedDict

from phloem.services.gateway.cluster.request import RequestState
from phloem.services.gateway.policies.snapshot import Decision
from phloem.services.gateway.route_report import RoutedAttempt, RouteReport

MAX_REQUESTS = 1024
MAX_ATTEMPTS = 16  # kept of one request: the first and the last ones


class _Entry:
    def __init__(self, state: RequestState) -> None:
        self.state: RequestState | None = state  # until it ends
        self.num_prompt_tokens = len(state.request.token_ids)
        self.attempts: list[RoutedAttempt] = []
        self.achieved: int | None = None


class RouteLog:
    """The last `max_requests` requests, oldest out first. A request is known from its first decision on."""

    def __init__(self, max_requests: int = MAX_REQUESTS) -> None:
        self._max_requests = max_requests
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def note(self, state: RequestState, decision: Decision, decided_in_s: float) -> None:
        """The next attempt goes there."""
        request_id = state.request.request_id
        entry = self._entries.setdefault(request_id, _Entry(state))
        entry.state = state
        attempt = RoutedAttempt(attempt=state.attempt + 1, decision=decision, decided_in_s=decided_in_s)
        entry.attempts.append(attempt)
        if len(entry.attempts) > MAX_ATTEMPTS:
            del entry.attempts[1]
        self._entries.move_to_end(request_id)
        while len(self._entries) > self._max_requests:
            self._entries.popitem(last=False)

    def ended(self, state: RequestState) -> RouteReport | None:
        """The request is over; its report, unless it was never routed or is forgotten."""
        request_id = state.request.request_id
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        entry.achieved = _achieved(state)
        entry.state = None
        return self.report(request_id)

    def decision(self, request_id: str) -> Decision | None:
        """Where the request went last."""
        entry = self._entries.get(request_id)
        return entry.attempts[-1].decision if entry is not None else None

    def report(self, request_id: str) -> RouteReport | None:
        """All that is known of the request now."""
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        return RouteReport(
            request_id=request_id,
            num_prompt_tokens=entry.num_prompt_tokens,
            attempts=list(entry.attempts),
            achievable_cached_tokens=entry.attempts[0].decision.best_cached_tokens,
            achieved_cached_tokens=_achieved(entry.state) if entry.state is not None else entry.achieved,
        )


def _achieved(state: RequestState) -> int | None:
    return state.num_cached_tokens if state.emitted else None

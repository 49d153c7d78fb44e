"""What the engine says to its front: one report per turn of the loop."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import msgspec

from phloem.shared.engine.block_changes import TreeEvents
from phloem.shared.engine.requests import Request
from phloem.shared.engine.scheduler import Made
from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.cluster import WorkerLoad
from phloem.shared.protocol.engine import EngineUp, GatewayOutputs, StepReport
from phloem.shared.protocol.session import Ended, EndReason, Output, TokensOut

MAX_SILENCE_S = 1.0  # while there are requests: its front kills an engine that is silent for long


class _Heads:
    """What the messages of requests have in common that make one token each in step after step: nothing of
    a request is looked at again. `requests` is known by its identity."""

    def __init__(self, requests: list[Request]) -> None:
        """Of requests that were just given a token."""
        self.requests = requests
        self._num_steps = 0
        self._heads = [
            (request.gateway, request.request_id, request.attempt, _index(request)) for request in requests
        ]

    def add_to(self, outputs: defaultdict[int, list[Output]], token_ids: list[int]) -> None:
        """The next token of each."""
        self._num_steps = steps = self._num_steps + 1
        for (gateway, request_id, attempt, index), token_id in zip(self._heads, token_ids, strict=True):
            outputs[gateway].append(TokensOut(request_id, attempt, index + steps, [token_id]))


class Outbox:
    """Collects the outputs of all requests, by gateway, until `flush` sends them as one report."""

    def __init__(self, send: Callable[[EngineUp], None]) -> None:
        self._send = send
        self._outputs: defaultdict[int, list[Output]] = defaultdict(list)
        self._heads: _Heads | None = None  # of the step before
        self._last_load = WorkerLoad()
        self._sent_s = 0.0

    @property
    def has_outputs(self) -> bool:
        return bool(self._outputs)

    def tokens(self, made: Made, now_s: float) -> None:
        """Tokens that were just appended to their requests."""
        heads = self._heads
        if heads is not None and made.same and heads.requests is made.requests:
            heads.add_to(self._outputs, made.token_ids)
            return
        outputs, finished = self._outputs, made.finished
        for request, token_id in zip(made.requests, made.token_ids, strict=True):
            output = TokensOut(request.request_id, request.attempt, _index(request), [token_id])
            if len(request.token_ids) == request.num_submitted_tokens + 1:
                output = _as_first(output, request, now_s)
            if finished and request in finished:  # mostly there are none, and hashing 256 requests counts
                output = msgspec.structs.replace(output, finish_reason=finished[request])
            outputs[request.gateway].append(output)
        self._heads = _Heads(made.requests) if made.same else None

    def ended(self, request: Request, reason: EndReason, error: ErrorInfo | None = None) -> None:
        self.refused(request.gateway, request.request_id, request.attempt, reason, error)

    def refused(
        self, gateway: int, request_id: str, attempt: int, reason: EndReason, error: ErrorInfo | None
    ) -> None:
        """The end of a request that never became one here."""
        self._add(gateway, Ended(request_id, attempt, reason, error))

    def flush(self, step: int, events: TreeEvents, load: WorkerLoad, now_s: float, *, busy: bool) -> None:
        """Sends one report if there is anything to say, or it has been long since the last one; `busy`: there
        are requests, which may all wait for something."""
        news = self._outputs or events.stored or events.removed or load != self._last_load
        if not news and not (busy and now_s - self._sent_s >= MAX_SILENCE_S):
            return
        self._sent_s = now_s
        outputs = [GatewayOutputs(gateway, items) for gateway, items in self._outputs.items()]
        self._outputs.clear()
        self._last_load = load
        self._send(StepReport(step, outputs, events.stored, events.removed, load))

    def _add(self, gateway: int, output: Output) -> None:
        self._outputs[gateway].append(output)


def _index(request: Request) -> int:
    """Of its newest token among those that were generated."""
    return len(request.token_ids) - 1 - request.num_prompt_tokens


def _as_first(output: TokensOut, request: Request, now_s: float) -> TokensOut:
    """The first token of this attempt says what was cached, and when things happened."""
    timeline = {
        "queued": round(request.admitted_s - request.arrived_s, 6),
        "first_token": round(now_s - request.arrived_s, 6),
    }
    return msgspec.structs.replace(output, num_cached_tokens=request.num_cached_tokens, timeline=timeline)

"""What the engine says to its front: one report per turn of the loop."""

from __future__ import annotations

from collections.abc import Callable

from phloem.shared.engine.radix_tree import TreeEvents
from phloem.shared.engine.requests import Request
from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.cluster import WorkerLoad
from phloem.shared.protocol.engine import EngineUp, GatewayOutputs, StepReport
from phloem.shared.protocol.session import Ended, EndReason, FinishReason, Output, TokensOut


class Outbox:
    """Collects the outputs of all requests, by gateway, until `flush` sends them as one report."""

    def __init__(self, send: Callable[[EngineUp], None]) -> None:
        self._send = send
        self._outputs: dict[int, list[Output]] = {}
        self._last_load = WorkerLoad()

    @property
    def has_outputs(self) -> bool:
        return bool(self._outputs)

    def token(
        self, request: Request, token_id: int, finish_reason: FinishReason | None, now_s: float
    ) -> None:
        """A token that was just appended to the request."""
        first = request.num_made == 1 + request.num_pending
        self._add(
            request.gateway,
            TokensOut(
                request.request_id,
                request.attempt,
                len(request.token_ids) - 1 - request.num_prompt_tokens,
                [token_id],
                finish_reason,
                request.num_cached_tokens if first else 0,
                _timeline(request, now_s) if first else {},
            ),
        )

    def ended(self, request: Request, reason: EndReason, error: ErrorInfo | None = None) -> None:
        self.refused(request.gateway, request.request_id, request.attempt, reason, error)

    def refused(
        self, gateway: int, request_id: str, attempt: int, reason: EndReason, error: ErrorInfo | None
    ) -> None:
        """The end of a request that never became one here."""
        self._add(gateway, Ended(request_id, attempt, reason, error))

    def flush(self, step: int, events: TreeEvents, load: WorkerLoad) -> None:
        """Sends one report if there is anything to say."""
        if not (self._outputs or events.stored or events.removed or load != self._last_load):
            return
        outputs = [GatewayOutputs(gateway, items) for gateway, items in self._outputs.items()]
        self._outputs = {}
        self._last_load = load
        self._send(StepReport(step, outputs, events.stored, events.removed, load))

    def _add(self, gateway: int, output: Output) -> None:
        self._outputs.setdefault(gateway, []).append(output)


def _timeline(request: Request, now_s: float) -> dict[str, float]:
    return {
        "queued": round(request.admitted_s - request.arrived_s, 6),
        "first_token": round(now_s - request.arrived_s, 6),
    }

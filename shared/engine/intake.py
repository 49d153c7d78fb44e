"""Submissions become requests: checked, numbered and queued; a bad one is answered at once."""

from __future__ import annotations

from collections.abc import Callable

from phloem.shared.engine.grammar.grammars import Grammars
from phloem.shared.engine.handover_send import HandoverSender
from phloem.shared.engine.outbox import Outbox
from phloem.shared.engine.requests import Request
from phloem.shared.engine.scheduler import Scheduler
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.engine import EngineSubmit


class Intake:
    """Every `EngineSubmit` passes here exactly once."""

    def __init__(
        self,
        scheduler: Scheduler,
        sender: HandoverSender,
        outbox: Outbox,
        grammars: Grammars,
        *,
        eos_token_ids: tuple[int, ...],
        context_length: int,
        clock: Callable[[], float],
    ) -> None:
        self._scheduler = scheduler
        self._sender = sender
        self._outbox = outbox
        self._grammars = grammars
        self._eos_token_ids = eos_token_ids
        self._context_length = context_length
        self._clock = clock
        self._num_requests = 0

    def submit(self, message: EngineSubmit) -> None:
        """Takes a request in, or answers at once why not."""
        submit = message.submit
        self._num_requests += 1
        request = Request(
            submit,
            gateway=message.gateway,
            order=self._num_requests,
            eos_token_ids=self._eos_token_ids,
            context_length=self._context_length,
            now_s=self._clock(),
        )
        try:
            self._check(request)
            self._grammars.check(request)
            self._scheduler.submit(request)
        except PhloemError as error:
            self._outbox.refused(message.gateway, submit.request_id, submit.attempt, "failed", error.info)
            return
        self._grammars.order(request)
        if request.phase == "prefill":
            self._sender.begin(request)

    def _check(self, request: Request) -> None:
        if request.phase != "both" and request.peer is None:
            raise PhloemError("bad_submit", f"phase {request.phase} needs a peer", http_status=400)
        if not 1 <= request.num_prompt_tokens <= request.num_submitted_tokens < request.token_limit:
            raise PhloemError(
                "context_length_exceeded",
                f"{request.num_submitted_tokens} tokens leave no room in a context of {self._context_length}",
                http_status=400,
                param="prompt",
            )

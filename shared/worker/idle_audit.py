"""Looks, when a worker has come to rest, whether every KV page still has one owner."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from phloem.shared.errors import PhloemError
from phloem.shared.protocol.engine import AuditReply
from phloem.shared.worker.metrics import WorkerMetrics
from phloem.shared.worker.sessions import Sessions

log = logging.getLogger(__name__)

REST_S = 5.0


class IdleAudit:
    """Asks the engine for an audit once each time that no request has been there for `rest_s`: it walks over
    all pages, which nobody shall wait for. Problems are a metric, and an error in the log."""

    def __init__(
        self,
        audit: Callable[[], Awaitable[AuditReply]],
        sessions: Sessions,
        metrics: WorkerMetrics,
        *,
        rest_s: float = REST_S,
    ) -> None:
        self._audit = audit
        self._sessions = sessions
        self._metrics = metrics
        self._rest_s = rest_s

    async def run(self) -> None:
        """Until cancelled."""
        audited = 0
        while True:
            await self._sessions.wait_idle()
            taken = self._sessions.num_taken
            await asyncio.sleep(self._rest_s)
            if audited != taken == self._sessions.num_taken and not self._sessions.num_requests:
                await self._look()
                audited = taken

    async def _look(self) -> None:
        try:
            reply = await self._audit()
        except PhloemError as error:
            log.warning("the pages could not be audited: %s", error)
            return
        self._metrics.audited(len(reply.problems))
        for problem in reply.problems:
            log.error("page audit: %s", problem)

"""How many sequences may be under way at once, in all and for one tenant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import Gauge

from phloem.shared.errors import PhloemError, overloaded

_RETRY_AFTER_S = 1.0


class Admission:
    """Counts sequences. `per_tenant` is at most `total`, or more than ever counts."""

    def __init__(self, *, total: int, per_tenant: int, gauge: Gauge) -> None:
        self._total = total
        self._per_tenant = per_tenant
        self._gauge = gauge
        self._by_tenant: Counter[str] = Counter()

    @property
    def num_inflight(self) -> int:
        return self._by_tenant.total()

    @contextmanager
    def admit(self, tenant: str, num_sequences: int) -> Iterator[None]:
        """Holds room for `num_sequences` of `tenant` inside the block.

        Raises `PhloemError`: 400 when they can never fit, 429 (`rate_limit_exceeded`) when the tenant has too
        many under way, 503 (`overloaded`) when all have.
        """
        self._check(tenant, num_sequences)
        self._by_tenant[tenant] += num_sequences
        self._gauge.set(self.num_inflight)
        try:
            yield
        finally:
            self._by_tenant[tenant] -= num_sequences
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant]
            self._gauge.set(self.num_inflight)

    def _check(self, tenant: str, num_sequences: int) -> None:
        most = min(self._total, self._per_tenant)
        if num_sequences > most:
            raise PhloemError(
                "too_many_sequences",
                f"this request asks for {num_sequences} sequences (prompts x n) at once: at most {most}",
                http_status=400,
                param="n",
            )
        if self._per_tenant < self._total and self._by_tenant[tenant] + num_sequences > self._per_tenant:
            raise PhloemError(
                "rate_limit_exceeded",
                f"this API key has {self._by_tenant[tenant]} of {self._per_tenant} sequences under way",
                retryable=True,
                http_status=429,
                retry_after_s=_RETRY_AFTER_S,
            )
        if self.num_inflight + num_sequences > self._total:
            raise overloaded(
                f"{self.num_inflight} of {self._total} sequences are under way: try again later",
                retry_after_s=_RETRY_AFTER_S,
            )

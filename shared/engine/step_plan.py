"""What one engine step computes: rows of requests; the same as columns where every row decodes.

A step's rows stand in the scheduler's order: decode rows (one token each), then chunks of prompts.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from phloem.shared.engine.requests import Request

Int64Array: TypeAlias = npt.NDArray[np.int64]

FROM_DEVICE = -1  # in place of an input token that is still only in the slot's last-token buffer


class Row(NamedTuple):
    """One request's share of a step: tokens [start, start + num_tokens) are computed.

    `samples`: the row reaches the last known token, so its logits make the next one. `from_device`: that
    one input token is still only in the slot's last-token buffer.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    from_device: bool


class DecodeBatch:
    """Requests that decode together, in a fixed order, and their slots, int64 `[B]`.

    Its identity means something: from one step of the same batch to the next, every row goes on by one
    token, and nothing else changes but the pages of the rows that `DecodeStep.grown` names.
    """

    __slots__ = ("constrained", "requests", "slots")

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests
        self.constrained = _constrained(requests)
        self.slots = np.fromiter((request.slot for request in requests), np.int64, len(requests))


class DecodeStep(NamedTuple):
    """One step of a batch: row i computes the token at `positions[i]` and samples the next.

    positions: int64 `[B]`; tokens: the input ids, `FROM_DEVICE` where only the device knows one, None when
    that is so for all; grown: rows that got pages since the batch's step before (of a batch's first step
    nothing is known before).
    """

    batch: DecodeBatch
    positions: Int64Array
    tokens: list[int] | None
    grown: list[int]


class StepPlan:
    """Rows, and for a step of decode rows alone the same as a `DecodeStep`. It never changes."""

    __slots__ = ("_rows", "decode")

    def __init__(self, rows: list[Row]) -> None:
        self._rows: list[Row] | None = rows
        self.decode = _as_decode_step(rows)

    @classmethod
    def of_decodes(cls, step: DecodeStep) -> StepPlan:
        """Makes the rows only when somebody asks for them."""
        plan = cls.__new__(cls)
        plan._rows = None
        plan.decode = step
        return plan

    @property
    def rows(self) -> list[Row]:
        if self._rows is None:
            self._rows = self._decode_rows()
        return self._rows

    @property
    def num_rows(self) -> int:
        return len(self.rows) if self.decode is None else len(self.decode.batch.requests)

    @property
    def num_tokens(self) -> int:
        if self.decode is not None:
            return len(self.decode.batch.requests)
        return sum(row.num_tokens for row in self.rows)

    @property
    def sampled(self) -> list[Request]:
        """Requests of the rows that sample, in order of the rows."""
        if self.decode is not None:
            return self.decode.batch.requests
        return [row.request for row in self.rows if row.samples]

    @property
    def constrained(self) -> list[int]:
        """Which of `sampled` have a grammar; when there are any, the step is sampled in a second phase."""
        return self.decode.batch.constrained if self.decode is not None else _constrained(self.sampled)

    @property
    def chunks(self) -> list[Row]:
        """Rows of more than one token."""
        return [] if self.decode is not None else [row for row in self.rows if row.num_tokens > 1]

    def count(self) -> None:
        """It will be launched: its tokens count as computed, and those that it samples as known."""
        if self.decode is not None:
            for request in self.decode.batch.requests:
                request.num_computed_tokens += 1
                request.num_in_flight += 1
                request.num_pending += 1
            return
        for row in self.rows:
            row.request.num_computed_tokens += row.num_tokens
            row.request.num_in_flight += 1
            row.request.num_pending += row.samples

    def _decode_rows(self) -> list[Row]:
        assert self.decode is not None
        batch, positions, tokens, _ = self.decode
        starts = positions.tolist()
        known = tokens or [FROM_DEVICE] * len(starts)
        return [
            Row(request, start, 1, True, token == FROM_DEVICE)
            for request, start, token in zip(batch.requests, starts, known, strict=True)
        ]


def _constrained(requests: list[Request]) -> list[int]:
    return [index for index, request in enumerate(requests) if request.constraint is not None]


def _as_decode_step(rows: list[Row]) -> DecodeStep | None:
    if not rows or not all(row.num_tokens == 1 and row.samples for row in rows):
        return None
    starts = [row.start for row in rows]
    tokens = [FROM_DEVICE if row.from_device else row.request.token_ids[row.start] for row in rows]
    return DecodeStep(
        DecodeBatch([row.request for row in rows]),
        np.array(starts, dtype=np.int64),
        tokens if any(token != FROM_DEVICE for token in tokens) else None,
        [],
    )


def chunk_row(request: Request, max_tokens: int) -> Row:
    """The next `max_tokens` known tokens that are not computed, or fewer."""
    missing = request.num_known_tokens - request.num_computed_tokens
    count = min(missing, max_tokens)
    return Row(request, request.num_computed_tokens, count, count == missing, False)

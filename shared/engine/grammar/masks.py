"""Which tokens the grammars of a step's rows allow: filled on the CPU while the step's forward pass runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from phloem.shared.engine.grammar.constraint import Constraint
from phloem.shared.engine.requests import Request, Status
from phloem.shared.engine.step_plan import StepPlan

if TYPE_CHECKING:
    from xgrammar import BatchGrammarMatcher, GrammarMatcher

_RING = 3  # steps that may read what was filled, and the one being filled
_FEW = 8  # fewer masks are not worth threads


class TokenMasks(NamedTuple):
    """rows: int64 `[N]`, which of the step's sampled rows each mask is for; bitmask: int32
    `[N, ceil(vocab / 32)]`, bit t % 32 of word t // 32 allows token t. On the host, pinned for CUDA."""

    rows: Tensor
    bitmask: Tensor


class Filled(NamedTuple):
    """`strays` are the requests whose answer left their grammar, `stuck` those that no token can follow in
    theirs. Neither has a mask that forbids anything: what their rows sample is dropped with them."""

    masks: TokenMasks
    strays: list[Request]
    stuck: list[Request]


class MaskFiller:
    """Follows the rows' requests in their grammars. Buffers are made with the first grammar."""

    def __init__(self, num_slots: int, vocab_size: int, *, pinned: bool) -> None:
        self._num_slots = num_slots
        self._num_words = -(-vocab_size // 32)
        self._last_word = np.int32(
            -1 if vocab_size % 32 == 0 else (1 << vocab_size % 32) - 1
        )  # the tokens' bits
        self._pinned = pinned
        self._buffers: list[TokenMasks] = []
        self._threads: BatchGrammarMatcher | None = None
        self._turn = 0

    def fill(self, plan: StepPlan) -> Filled:
        """The masks of a plan's constrained rows, whose tokens before are all known."""
        wanted: list[tuple[int, Constraint]] = []
        strays: list[Request] = []
        for row in plan.constrained:
            request = plan.sampled[row]
            constraint = request.constraint
            if request.status is Status.ENDED or constraint is None:
                continue
            if constraint.follow(request.token_ids[request.num_prompt_tokens :]):
                wanted.append((row, constraint))
            else:
                strays.append(request)
        masks = self._masks(wanted)
        return Filled(masks, strays, [plan.sampled[row] for row in self._open_dead_ends(masks)])

    def _masks(self, wanted: list[tuple[int, Constraint]]) -> TokenMasks:
        rows, bitmask = self._next_buffer()
        count = len(wanted)
        rows[:count] = torch.tensor([row for row, _ in wanted], dtype=torch.int64)
        matchers = [constraint.matcher for _, constraint in wanted]
        if count < _FEW:
            for index, matcher in enumerate(matchers):
                matcher.fill_next_token_bitmask(bitmask, index)
        else:
            self._fill_together(matchers, bitmask[:count])
        return TokenMasks(rows[:count], bitmask[:count])

    def _open_dead_ends(self, masks: TokenMasks) -> list[int]:
        """Rows of the step whose masks allow no token. There is nothing to draw from, so all is allowed."""
        words = masks.bitmask.numpy()
        is_open = words[:, :-1].any(axis=1) | ((words[:, -1] & self._last_word) != 0)
        stuck = np.flatnonzero(~is_open)
        words[stuck] = -1
        rows: list[int] = masks.rows.numpy()[stuck].tolist()
        return rows

    def _fill_together(self, matchers: list[GrammarMatcher], bitmask: Tensor) -> None:
        """On xgrammar's threads."""
        if self._threads is None:
            from xgrammar import BatchGrammarMatcher  # it is here by now: the matchers are its

            self._threads = BatchGrammarMatcher()
        self._threads.batch_fill_next_token_bitmask(matchers, bitmask)

    def _next_buffer(self) -> TokenMasks:
        if not self._buffers:
            self._buffers = [self._make_buffer() for _ in range(_RING)]
        self._turn = (self._turn + 1) % _RING
        return self._buffers[self._turn]

    def _make_buffer(self) -> TokenMasks:
        return TokenMasks(
            torch.zeros(self._num_slots, dtype=torch.int64, pin_memory=self._pinned),
            torch.zeros(self._num_slots, self._num_words, dtype=torch.int32, pin_memory=self._pinned),
        )

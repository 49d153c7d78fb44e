"""One request across workers and attempts: merges tokens in order, and says what an event means. Pure.

Tokens of the prefill worker (token 0) and of the decode worker (1, 2, ...) arrive in any order and carry
their index; each index is emitted once. When an attempt fails, the next one submits prompt + emitted tokens:

    prompt (num_prompt_tokens)  |  emitted, all attempts so far  |  pending: came before their turn
    0 .......................... n ............................ n + len(emitted)
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from phloem.services.gateway.generation import GeneratedTokens, GenerationRequest
from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.session import Ended, FinishReason, PeerRef, Phase, Submit, TokensOut

# Codes with which a worker reports trouble with the other one of its pair.
_PEER_CODE_PREFIXES = ("peer_", "transfer_", "handover_", "channel_", "kv_")
# The other worker gave up first: its own report, which says why, is under way.
_ECHO_CODE = "handover_cancelled"


class AttemptFailure(msgspec.Struct, frozen=True):
    """Why an attempt ended without finishing the request, and which worker the next one avoids."""

    error: ErrorInfo
    avoid: PeerRef | None


class Leg:
    """One worker's part in the present attempt."""

    def __init__(self, phase: Phase, submitted_at_s: float) -> None:
        self.phase = phase
        self.submitted_at_s = submitted_at_s  # since the call
        self.over = False  # ended or lost
        self.produced = False


Legs: TypeAlias = dict[PeerRef, Leg]


class RequestState:
    """The state machine; its owner feeds it events and looks at `failure`, `finished` and `in_grace` after
    each."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.attempt = 0
        self.legs: Legs = {}
        self.emitted: list[int] = []
        self.failure: AttemptFailure | None = None
        self.finished = False
        self.num_cached_tokens = 0
        self.timeline: dict[str, float] = {}
        self._base = 0  # emitted tokens when the attempt began
        self._pending: dict[int, list[int]] = {}
        self._finish: tuple[int, FinishReason] | None = None  # number of tokens in all, and why
        self._proof_needed = False
        self._echo: AttemptFailure | None = None
        self._num_taken = 0
        self._timeline_taken = 0

    @property
    def decided(self) -> bool:
        """Whether the present attempt has come to its end; what workers still send of it is ignored."""
        return self.finished or self.failure is not None

    @property
    def in_grace(self) -> bool:
        """Whether the worker that is left must show soon that it can go on without the other."""
        return self._proof_needed and not self.decided

    @property
    def token_ids(self) -> list[int]:
        """What the next attempt must have computed: the prompt and all tokens emitted."""
        return [*self.request.token_ids, *self.emitted]

    @property
    def open_workers(self) -> list[PeerRef]:
        """Workers that still hold something of the present attempt."""
        return [worker for worker, leg in self.legs.items() if not leg.over]

    def begin(
        self, phases: dict[PeerRef, Phase], block_hashes: list[bytes], elapsed_s: float
    ) -> dict[PeerRef, Submit]:
        """Starts the next attempt on these workers; returns what to submit to each."""
        self.attempt += 1
        self.failure = None
        self._base = len(self.emitted)
        self._pending.clear()
        self._finish = None
        self.finished = False
        self._proof_needed = False
        self._echo = None
        self.legs = {worker: Leg(phase, elapsed_s) for worker, phase in phases.items()}
        token_ids = self.token_ids
        return {
            worker: self._submit(worker, phase, token_ids, block_hashes, elapsed_s)
            for worker, phase in phases.items()
        }

    def on_tokens(self, worker: PeerRef, output: TokensOut) -> None:
        """Merges what a worker made, by index; what came before, or of an earlier attempt, is dropped."""
        leg = self._open_leg(worker, output.attempt)
        if leg is None or self.decided:
            return
        if output.timeline or output.num_cached_tokens:
            self._note_origin(leg, output)
        leg.produced = True
        if output.start == len(self.emitted) and not self._pending:
            self.emitted += output.token_ids
        else:
            self._pending[output.start] = output.token_ids
            self._merge()
        if output.finish_reason is not None:
            self._finish = (output.start + len(output.token_ids), output.finish_reason)
        if self._finish is not None:
            self.finished = len(self.emitted) >= self._finish[0]
        if leg.phase == "decode" and not self._pending:
            self._proof_needed = False

    def on_ended(self, worker: PeerRef, ended: Ended) -> None:
        """A worker is done with its part: well, or so that the attempt fails."""
        leg = self._open_leg(worker, ended.attempt)
        if leg is None:
            return
        leg.over = True
        if self.decided:
            return
        if ended.reason in ("failed", "aborted"):
            self._on_failed(worker, leg, ended.error or _aborted(worker))
        elif ended.reason == "finished":
            self._proof_needed = True  # its last tokens wait for the other's first
        self._check_complete()

    def on_lost(self, worker: PeerRef, error: ErrorInfo) -> None:
        """The session with `worker` broke, or its lease ran out."""
        leg = self._open_leg(worker, self.attempt)
        if leg is None:
            return
        leg.over = True
        if self.decided:
            return
        if leg.phase != "prefill" or not leg.produced:
            self._fail(error, worker)
        elif not self._decode_produced():
            self._proof_needed = True
        self._check_complete()

    def on_grace_over(self) -> None:
        """The worker that was left did not go on in time."""
        if self.in_grace:
            self._fail_handover()

    def take(self) -> GeneratedTokens | None:
        """What became known since the last call; None when there is nothing new."""
        if len(self.emitted) == self._num_taken and not self.finished:
            return None
        tokens = self.emitted[self._num_taken :]
        reason = self._finish[1] if self._finish is not None and self.finished else None
        self._num_taken = len(self.emitted)
        news = len(self.timeline) > self._timeline_taken
        self._timeline_taken = len(self.timeline)
        return GeneratedTokens(tokens, reason, self.num_cached_tokens, dict(self.timeline) if news else {})

    def _submit(
        self, worker: PeerRef, phase: Phase, token_ids: list[int], block_hashes: list[bytes], elapsed_s: float
    ) -> Submit:
        return Submit(
            request_id=self.request.request_id,
            attempt=self.attempt,
            epoch=worker.epoch,
            phase=phase,
            token_ids=token_ids,
            num_prompt_tokens=len(self.request.token_ids),
            sampling=self.request.sampling,
            peer=next((other for other in self.legs if other != worker), None),
            block_hashes=block_hashes,
            cache_salt=self.request.cache_salt,
            timeout_s=max(0.001, self.request.timeout_s - elapsed_s),
        )

    def _open_leg(self, worker: PeerRef, attempt: int) -> Leg | None:
        """The leg that an event belongs to; None when the event is late."""
        leg = self.legs.get(worker) if attempt == self.attempt else None
        return leg if leg is not None and not leg.over else None

    def _decode_produced(self) -> bool:
        return any(leg.produced for leg in self.legs.values() if leg.phase == "decode")

    def _merge(self) -> None:
        """Moves what has its turn from pending to emitted; what was emitted before is dropped."""
        for start in sorted(self._pending):
            if start > len(self.emitted):
                return
            token_ids = self._pending.pop(start)
            self.emitted += token_ids[len(self.emitted) - start :]

    def _note_origin(self, leg: Leg, output: TokensOut) -> None:
        if leg.phase != "decode" and self._base == 0:
            self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        for name, seconds in output.timeline.items():
            self.timeline.setdefault(f"{leg.phase}.{name}", leg.submitted_at_s + seconds)

    def _on_failed(self, worker: PeerRef, leg: Leg, error: ErrorInfo) -> None:
        if leg.phase == "prefill" and self._decode_produced() and not self._pending:
            return  # decode has all that it needs
        blames_peer = error.code.startswith(_PEER_CODE_PREFIXES)
        other = next((peer for peer in self.legs if peer != worker), worker)
        if error.code == _ECHO_CODE and self.open_workers:
            self._echo = AttemptFailure(error, other)
            self._proof_needed = True
            return
        self._fail(error, other if blames_peer else worker)

    def _check_complete(self) -> None:
        if not self.open_workers and not self.finished:
            self._fail_handover()

    def _fail_handover(self) -> None:
        over = next((worker for worker, leg in self.legs.items() if leg.over), None)
        self.failure = self.failure or self._echo or AttemptFailure(_handover_lost(), over)

    def _fail(self, error: ErrorInfo, avoid: PeerRef) -> None:
        self.failure = self.failure or AttemptFailure(error, avoid)


def _aborted(worker: PeerRef) -> ErrorInfo:
    message = f"worker {worker.worker_id} gave the request up"
    return ErrorInfo("worker_aborted", message, retryable=True, http_status=503)


def _handover_lost() -> ErrorInfo:
    message = "a worker was lost while it handed the request over"
    return ErrorInfo("handover_lost", message, retryable=True, http_status=503)

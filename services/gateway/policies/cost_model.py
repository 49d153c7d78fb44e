"""What a worker would cost a request, in seconds. With u(w) the tokens of the prompt that worker w lacks:

    prefill on P, decode on D = queue(P) + u(P) / rate(P) + hand-over + u(D) * kv_bytes / bandwidth(P)
    both phases on D          = queue(D) + u(D) / rate(D) + the same time once per request it holds up
    and, either way, for D    = predicted step time x expected output + waiting for a slot + waiting for pages

Only the transfer depends on both workers, and it is a product: bytes that D lacks x seconds per byte of P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from msgspec import Struct

from phloem.services.gateway.policies.snapshot import Candidate, RoutingRequest
from phloem.shared.protocol.cluster import WorkerLoad, WorkerRecord

# Until any worker has measured itself; one that has not is taken for as fast as the others are on average.
PRIOR_PREFILL_TOKENS_PER_S = 2_000.0
PRIOR_DECODE_STEP_S = 0.03
PRIOR_TRANSFER_BYTES_PER_S = 1e9
PRIOR_CUDA_TRANSFER_BYTES_PER_S = 50e9
HANDOVER_S = 0.005
EXPECTED_OUTPUT_TOKENS = 64  # a request's output is unknown; it is at most this for the cost
STEP_GROWTH = 0.05  # share by which one more request makes a decode step longer
NO_PAGES_S = 10.0  # waiting for the whole need to be freed; a part of it costs that part


class Norms(Struct, frozen=True):
    """What a worker that has not measured itself is taken for."""

    prefill_tokens_per_s: float = PRIOR_PREFILL_TOKENS_PER_S
    decode_step_s: float = PRIOR_DECODE_STEP_S
    transfer_bytes_per_s: float = 0.0  # 0: none has, and it depends on the device

    @classmethod
    def of(cls, candidates: Sequence[Candidate]) -> Norms:
        """The means over those that have measured themselves, or the priors."""
        loads = [candidate.record.load for candidate in candidates]
        return cls(
            _mean([load.prefill_tokens_per_s for load in loads], PRIOR_PREFILL_TOKENS_PER_S),
            _mean([load.decode_step_s for load in loads], PRIOR_DECODE_STEP_S),
            _mean([load.transfer_bytes_per_s for load in loads], 0.0),
        )

    def prefill_rate(self, load: WorkerLoad) -> float:
        """Prompt tokens per second, at least one."""
        return max(1.0, load.prefill_tokens_per_s or self.prefill_tokens_per_s)

    def bandwidth(self, record: WorkerRecord) -> float:
        """Bytes per second of KV transfer, at least a kilobyte."""
        cuda = record.device.startswith("cuda")
        prior = PRIOR_CUDA_TRANSFER_BYTES_PER_S if cuda else PRIOR_TRANSFER_BYTES_PER_S
        return max(1000.0, record.load.transfer_bytes_per_s or self.transfer_bytes_per_s or prior)


class PrefillCost(NamedTuple):
    """Of prefilling on a worker for another one to decode."""

    fixed_s: float  # queue, compute and hand-over
    s_per_byte: float
    worker: Candidate
    queue_s: float
    compute_s: float

    def terms(self) -> dict[str, float]:
        return {"prefill_queue": self.queue_s, "prefill": self.compute_s, "handover": HANDOVER_S}


class DecodeCost(NamedTuple):
    """Of decoding on a worker, whoever prefills."""

    fixed_s: float
    num_bytes: float  # of KV that it lacks
    worker: Candidate
    decode_s: float
    slot_queue_s: float
    no_pages_s: float

    def terms(self) -> dict[str, float]:
        terms = {"decode": self.decode_s, "slot_queue": self.slot_queue_s, "no_pages": self.no_pages_s}
        return {name: seconds for name, seconds in terms.items() if seconds or name == "decode"}


class AloneCost(NamedTuple):
    """Of both phases on one worker."""

    total_s: float
    decode: DecodeCost
    queue_s: float
    compute_s: float
    interference_s: float

    def terms(self) -> dict[str, float]:
        terms = {**self.decode.terms(), "prefill_queue": self.queue_s, "prefill": self.compute_s}
        return {**terms, "interference": self.interference_s} if self.interference_s else terms


def pair_cost_s(prefill: PrefillCost, decode: DecodeCost) -> float:
    """The whole cost of a pair."""
    return prefill.fixed_s + decode.fixed_s + decode.num_bytes * prefill.s_per_byte


def pair_terms(prefill: PrefillCost, decode: DecodeCost) -> dict[str, float]:
    """The same by name."""
    return {**prefill.terms(), **decode.terms(), "transfer": decode.num_bytes * prefill.s_per_byte}


class CostModel:
    """Prices the workers of one snapshot for one request."""

    def __init__(self, request: RoutingRequest, norms: Norms) -> None:
        self._num_tokens = request.num_tokens
        self._num_output = min(request.max_new_tokens, EXPECTED_OUTPUT_TOKENS)
        self._norms = norms

    def prefill(self, worker: Candidate) -> PrefillCost:
        record = worker.record
        rate = self._norms.prefill_rate(record.load)
        queue_s = worker.queued_tokens / rate
        compute_s = max(1, self._num_tokens - worker.cached_tokens) / rate
        fixed_s = queue_s + compute_s + HANDOVER_S
        return PrefillCost(fixed_s, 1.0 / self._norms.bandwidth(record), worker, queue_s, compute_s)

    def decode(self, worker: Candidate) -> DecodeCost:
        record = worker.record
        load, most, batch = record.load, record.max_running_requests, worker.num_requests + 1
        lacking = max(1, self._num_tokens - worker.cached_tokens)
        decode_s = predicted_step_s(load, batch, self._norms) * self._num_output
        slot_queue_s = decode_s * (batch - most) / most if 0 < most < batch else 0.0
        no_pages_s = 0.0
        if load.total_pages:
            missing = 1.0 - load.free_pages * record.page_size / (lacking + self._num_output)
            no_pages_s = NO_PAGES_S * missing if missing > 0.0 else 0.0
        fixed_s = decode_s + slot_queue_s + no_pages_s
        return DecodeCost(
            fixed_s, lacking * record.kv_bytes_per_token, worker, decode_s, slot_queue_s, no_pages_s
        )

    def alone(self, decode: DecodeCost) -> AloneCost:
        """Both phases where `decode` is. A decode worker's running requests wait meanwhile; a unified
        worker's do so whatever it prefills, also for others."""
        worker = decode.worker
        rate = self._norms.prefill_rate(worker.record.load)
        queue_s = worker.queued_tokens / rate
        compute_s = max(1, self._num_tokens - worker.cached_tokens) / rate
        interference_s = compute_s * (1 + worker.num_requests) if worker.record.role == "decode" else 0.0
        total_s = decode.fixed_s + queue_s + compute_s + interference_s
        return AloneCost(total_s, decode, queue_s, compute_s, interference_s)


def predicted_step_s(load: WorkerLoad, batch: int, norms: Norms) -> float:
    """The duration of a decode step with `batch` requests, from the one measured last."""
    measured = load.decode_step_s or norms.decode_step_s
    return measured * (1 + STEP_GROWTH * batch) / (1 + STEP_GROWTH * max(1, load.num_running))


def _mean(measured: Sequence[float], prior: float) -> float:
    known = [value for value in measured if value > 0]
    return sum(known) / len(known) if known else prior

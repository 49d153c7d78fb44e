"""What a worker would cost a request, in seconds. With u(w) the tokens of the prompt that worker w lacks:

    prefill on P, decode on D = queue(P) + u(P) / rate(P) + hand-over + u(D) * kv_bytes / bandwidth(P)
    both phases on D          = queue(D) + u(D) / rate(D) + the same time once per request it holds up
    and, either way, for D    = predicted step time x expected output + waiting for a slot + waiting for pages

Only the transfer depends on both workers, and it is a product: bytes that D lacks x seconds per byte of P.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

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
            _mean([n for load in loads if (n := load.prefill_tokens_per_s) > 0], PRIOR_PREFILL_TOKENS_PER_S),
            _mean([n for load in loads if (n := load.decode_step_s) > 0], PRIOR_DECODE_STEP_S),
            _mean([n for load in loads if (n := load.transfer_bytes_per_s) > 0], 0.0),
        )

    def prefill_rate(self, load: WorkerLoad) -> float:
        """Prompt tokens per second, at least one."""
        rate = load.prefill_tokens_per_s or self.prefill_tokens_per_s
        return rate if rate > 1.0 else 1.0

    def bandwidth(self, record: WorkerRecord) -> float:
        """Bytes per second of KV transfer, at least a kilobyte."""
        rate = record.load.transfer_bytes_per_s or self.transfer_bytes_per_s
        if not rate:
            cuda = record.device.startswith("cuda")
            rate = PRIOR_CUDA_TRANSFER_BYTES_PER_S if cuda else PRIOR_TRANSFER_BYTES_PER_S
        return rate if rate > 1000.0 else 1000.0

    def decode_step(self, load: WorkerLoad, batch: int) -> float:
        """Predicted seconds of a decode step with `batch` requests, from the one measured last."""
        running = load.num_running if load.num_running > 1 else 1
        measured = load.decode_step_s or self.decode_step_s
        return measured * (1.0 + STEP_GROWTH * batch) / (1.0 + STEP_GROWTH * running)


class PrefillCost(Struct, frozen=True, gc=False):
    """Of prefilling on a worker for another one to decode. `share` is seconds per byte of KV sent."""

    worker: Candidate
    fixed_s: float  # queue, compute and hand-over
    share: float
    queue_s: float
    compute_s: float

    def terms(self) -> dict[str, float]:
        return {"prefill_queue": self.queue_s, "prefill": self.compute_s, "handover": HANDOVER_S}


class DecodeCost(Struct, frozen=True, gc=False):
    """Of decoding on a worker, whoever prefills. `share` is the bytes of KV that it lacks."""

    worker: Candidate
    fixed_s: float
    share: float
    decode_s: float
    slot_queue_s: float
    no_pages_s: float

    def terms(self) -> dict[str, float]:
        terms = {"decode": self.decode_s, "slot_queue": self.slot_queue_s, "no_pages": self.no_pages_s}
        return {name: seconds for name, seconds in terms.items() if seconds or name == "decode"}


class AloneCost(Struct, frozen=True, gc=False):
    """Of both phases on one worker."""

    decode: DecodeCost
    total_s: float
    queue_s: float
    compute_s: float
    interference_s: float

    def terms(self) -> dict[str, float]:
        terms = {**self.decode.terms(), "prefill_queue": self.queue_s, "prefill": self.compute_s}
        return {**terms, "interference": self.interference_s} if self.interference_s else terms


def pair_cost_s(prefill: PrefillCost, decode: DecodeCost) -> float:
    """The whole cost of a pair."""
    return prefill.fixed_s + decode.fixed_s + decode.share * prefill.share


def pair_terms(prefill: PrefillCost, decode: DecodeCost) -> dict[str, float]:
    """The same by name."""
    return {**prefill.terms(), **decode.terms(), "transfer": decode.share * prefill.share}


class CostModel:
    """Prices the workers of one snapshot for one request. Its methods run for every worker of the cluster at
    every request, so they do without calls that an expression can replace."""

    def __init__(self, request: RoutingRequest, norms: Norms) -> None:
        self._num_tokens = request.num_tokens
        self._num_output = min(request.max_new_tokens, EXPECTED_OUTPUT_TOKENS)
        self._norms = norms

    def prefill(self, worker: Candidate) -> PrefillCost:
        """Of computing the prompt there; `worker` is not of role decode."""
        record = worker.record
        rate = self._norms.prefill_rate(record.load)
        queue_s = worker.queued_tokens / rate
        compute_s = self._lacking(worker) / rate
        return PrefillCost(
            worker,
            queue_s + compute_s + HANDOVER_S,
            1.0 / self._norms.bandwidth(record),
            queue_s,
            compute_s,
        )

    def decode(self, worker: Candidate) -> DecodeCost:
        """Of generating there; `worker` is not of role prefill."""
        record = worker.record
        load, most, batch = record.load, record.max_running_requests, worker.num_requests + 1
        lacking = self._lacking(worker)
        decode_s = self._norms.decode_step(load, batch) * self._num_output
        slot_queue_s = decode_s * (batch - most) / most if 0 < most < batch else 0.0
        no_pages_s = 0.0
        if load.total_pages:
            missing = 1.0 - load.free_pages * record.page_size / (lacking + self._num_output)
            no_pages_s = NO_PAGES_S * missing if missing > 0.0 else 0.0
        return DecodeCost(
            worker,
            decode_s + slot_queue_s + no_pages_s,
            lacking * record.kv_bytes_per_token,
            decode_s,
            slot_queue_s,
            no_pages_s,
        )

    def alone(self, decode: DecodeCost) -> AloneCost:
        """Both phases where `decode` is. A decode worker's running requests wait meanwhile; a unified
        worker's do so whatever it prefills, also for others."""
        worker = decode.worker
        rate = self._norms.prefill_rate(worker.record.load)
        queue_s = worker.queued_tokens / rate
        compute_s = self._lacking(worker) / rate
        interference_s = compute_s * (1 + worker.num_requests) if worker.record.role == "decode" else 0.0
        total_s = decode.fixed_s + queue_s + compute_s + interference_s
        return AloneCost(decode, total_s, queue_s, compute_s, interference_s)

    def _lacking(self, worker: Candidate) -> int:
        """Tokens of the prompt to compute: the last one always is."""
        lacking = self._num_tokens - worker.cached_tokens
        return lacking if lacking > 1 else 1


def _mean(known: Sequence[float], prior: float) -> float:
    return fsum(known) / len(known) if known else prior  # fsum: the same in any order

"""Where a request goes: pure functions of a snapshot, so that a simulator can run them too.

Policy `cost` counts in seconds. With u(w) the tokens of the prompt that worker w lacks:

    prefill on P, decode on D = queue(P) + u(P) / rate(P) + hand-over + u(D) * kv_bytes / bandwidth(P)
    both phases on D          = queue(D) + u(D) / rate(D) + the same time once per request it holds up
    and, either way, for D    = predicted step time x expected output + waiting for a slot + waiting for pages

The cheapest wins; equal ones are told apart by a hash of request and worker, so that the choice is random
over requests and the same for one request wherever it is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import msgspec

from phloem.services.gateway.cluster.options import RoutingPolicy
from phloem.shared.protocol.cluster import WorkerLoad, WorkerRecord
from phloem.shared.protocol.session import PeerRef

# Until any worker has measured itself; one that has not is taken for as fast as the others are on average.
PRIOR_PREFILL_TOKENS_PER_S = 2_000.0
PRIOR_DECODE_STEP_S = 0.03
PRIOR_TRANSFER_BYTES_PER_S = 1e9
PRIOR_CUDA_TRANSFER_BYTES_PER_S = 50e9
HANDOVER_S = 0.005
EXPECTED_OUTPUT_TOKENS = 64  # a request's output is unknown; it is at most this for the cost
STEP_GROWTH = 0.05  # share by which one more request makes a decode step longer
NO_PAGES_S = 10.0  # waiting for the whole need to be freed; a part of it costs that part


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that takes requests now, with what this gateway itself has under way there (the heartbeat may
    not know of it yet) and how many tokens of the prompt it holds."""

    record: WorkerRecord
    own_requests: int = 0
    own_prefill_tokens: int = 0
    cached_tokens: int = 0

    @property
    def ref(self) -> PeerRef:
        return PeerRef(self.record.worker_id, self.record.epoch)


class RoutingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`sequence` counts this gateway's requests (round robin)."""

    request_id: str
    num_tokens: int
    max_new_tokens: int
    sequence: int = 0
    attempt: int = 1


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """`prefill` is None when `decode` does both phases. `terms` are the cost by name, in seconds."""

    decode: PeerRef
    prefill: PeerRef | None = None
    policy: RoutingPolicy
    terms: dict[str, float]
    num_options: int = 1

    @property
    def cost_s(self) -> float:
        return sum(self.terms.values())


class Norms(msgspec.Struct, frozen=True):
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


class Option(msgspec.Struct, frozen=True):
    """One way to serve a request."""

    decode: Candidate
    prefill: Candidate | None


def route(policy: RoutingPolicy, request: RoutingRequest, candidates: Sequence[Candidate]) -> Decision | None:
    """The decision, or None when no worker can decode."""
    options = options_of(candidates)
    if policy != "cost":  # these don't know when local prefill is worth it: only where there is no pair
        options = [option for option in options if not _is_local(option)] or options
    if not options:
        return None
    norms = Norms.of(candidates)
    terms = [
        cost_terms(request, option, norms)
        if policy == "cost"
        else _simple_terms(policy, request, option, index, len(options))
        for index, option in enumerate(options)
    ]
    best = min(range(len(options)), key=lambda n: (sum(terms[n].values()), _tie(request, options[n])))
    chosen = options[best]
    return Decision(
        decode=chosen.decode.ref,
        prefill=chosen.prefill.ref if chosen.prefill is not None else None,
        policy=policy,
        terms=terms[best],
        num_options=len(options),
    )


def options_of(candidates: Sequence[Candidate]) -> list[Option]:
    """Every pair that can exchange KV, and every worker that can do both phases."""
    return list(_options(sorted(candidates, key=lambda c: c.record.worker_id)))


def _options(candidates: Sequence[Candidate]) -> Iterator[Option]:
    for decode in candidates:
        if decode.record.role == "prefill":
            continue
        yield Option(decode, None)
        for prefill in candidates:
            if _may_hand_over(prefill.record, decode.record):
                yield Option(decode, prefill)


def _is_local(option: Option) -> bool:
    return option.prefill is None and option.decode.record.role == "decode"


def _may_hand_over(prefill: WorkerRecord, decode: WorkerRecord) -> bool:
    """Two unified workers never pair: each does both phases, and they open no channel."""
    roles = (prefill.role, decode.role)
    return (
        roles in (("prefill", "decode"), ("prefill", "unified"), ("unified", "decode"))
        and prefill.kv_layout == decode.kv_layout
        and decode.transfer_address != ""
    )


def _simple_terms(
    policy: RoutingPolicy, request: RoutingRequest, option: Option, index: int, num_options: int
) -> dict[str, float]:
    """Numbers that rank the options of the other policies; they are not seconds."""
    if policy == "least_loaded":
        workers = [option.decode, *([option.prefill] if option.prefill is not None else [])]
        return {"load": float(sum(_num_requests(worker) for worker in workers))}
    if policy == "round_robin":
        return {"turn": float((index - request.sequence) % num_options)}
    return {}


def cost_terms(request: RoutingRequest, option: Option, norms: Norms) -> dict[str, float]:
    """The terms of the cost of one option, in seconds."""
    prefill, decode = option.prefill, option.decode
    lacking = max(1, request.num_tokens - decode.cached_tokens)
    terms = _decode_terms(request, decode, norms)
    if prefill is None:
        rate = norms.prefill_rate(decode.record.load)
        compute_s = lacking / rate
        terms["prefill_queue"] = _queued_tokens(decode) / rate
        terms["prefill"] = compute_s
        if _is_local(option):  # what it runs, and will run, waits meanwhile
            terms["interference"] = compute_s * (1 + _num_requests(decode))
        return terms
    rate, bandwidth = norms.prefill_rate(prefill.record.load), norms.bandwidth(prefill.record)
    terms["prefill_queue"] = _queued_tokens(prefill) / rate
    terms["prefill"] = max(1, request.num_tokens - prefill.cached_tokens) / rate
    terms["handover"] = HANDOVER_S
    terms["transfer"] = lacking * decode.record.kv_bytes_per_token / bandwidth
    return terms


def _decode_terms(request: RoutingRequest, decode: Candidate, norms: Norms) -> dict[str, float]:
    record, batch = decode.record, _num_requests(decode)
    step_s = predicted_step_s(record.load, batch + 1, norms)
    output = min(request.max_new_tokens, EXPECTED_OUTPUT_TOKENS)
    terms = {"decode": step_s * output}
    if record.max_running_requests:
        beyond = max(0, batch + 1 - record.max_running_requests)
        terms["slot_queue"] = step_s * output * beyond / record.max_running_requests
    if record.load.total_pages:
        need = max(1, request.num_tokens - decode.cached_tokens + output)
        free = record.load.free_pages * record.page_size
        terms["no_pages"] = NO_PAGES_S * max(0.0, 1.0 - free / need)
    return terms


def predicted_step_s(load: WorkerLoad, batch: int, norms: Norms) -> float:
    """The duration of a decode step with `batch` requests, from the one measured last."""
    measured = load.decode_step_s or norms.decode_step_s
    return measured * (1 + STEP_GROWTH * batch) / (1 + STEP_GROWTH * max(1, load.num_running))


def _mean(measured: Sequence[float], prior: float) -> float:
    known = [value for value in measured if value > 0]
    return sum(known) / len(known) if known else prior


def _num_requests(worker: Candidate) -> int:
    load = worker.record.load
    return max(load.num_running + load.num_waiting, worker.own_requests)


def _queued_tokens(worker: Candidate) -> int:
    return max(worker.record.load.queued_tokens, worker.own_prefill_tokens)


def _tie(request: RoutingRequest, option: Option) -> bytes:
    names = [request.request_id, str(request.attempt), option.decode.record.worker_id]
    if option.prefill is not None:
        names.append(option.prefill.record.worker_id)
    return blake2b("\0".join(names).encode(), digest_size=8).digest()

"""Policy `cost`: the exact cheapest of all pairs, its explanation, and what it does with a hot prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.services.gateway.policies.cost import alone_key, choose_cheapest, pair_key
from phloem.services.gateway.policies.cost_model import CostModel, Norms
from phloem.services.gateway.policies.snapshot import Candidate, RoutingRequest
from phloem.services.gateway.policies.ties import Draw
from phloem.shared.protocol.cluster import Role, WorkerLoad, WorkerRecord
from phloem.shared.protocol.session import PeerRef
from tests.support.routing import request, worker

PAIRING_ROLES = (("prefill", "decode"), ("prefill", "unified"), ("unified", "decode"))


def may_hand_over(prefill: WorkerRecord, decode: WorkerRecord) -> bool:
    return (
        (prefill.role, decode.role) in PAIRING_ROLES
        and prefill.kv_layout == decode.kv_layout
        and decode.transfer_address != ""
        and decode.worker_id not in prefill.load.cut_off
    )


def brute_force(
    wanted: RoutingRequest, candidates: Sequence[Candidate]
) -> tuple[PeerRef | None, PeerRef, int]:
    """The cheapest after a look at every single way: prefill, decode, and the number of ways."""
    model, draw = CostModel(wanted, Norms.of(candidates)), Draw(wanted)
    ways: list[tuple[tuple[float, ...], PeerRef | None, PeerRef]] = []
    for taker in candidates:
        if taker.record.role == "prefill":
            continue
        decode = model.decode(taker)
        ways.append((alone_key(model.alone(decode), draw), None, taker.ref))
        for giver in candidates:
            if may_hand_over(giver.record, taker.record):
                ways.append((pair_key(model.prefill(giver), decode, draw), giver.ref, taker.ref))
    _, prefill, decode_ref = min(ways, key=lambda way: way[0])
    return prefill, decode_ref, len(ways)


# Few values, so that costs are often equal in part or whole.
loads = st.builds(
    WorkerLoad,
    num_running=st.integers(0, 12),
    num_waiting=st.integers(0, 2),
    queued_tokens=st.sampled_from([0, 0, 700, 701, 5000]),
    free_pages=st.sampled_from([0, 10, 1000]),
    total_pages=st.sampled_from([0, 1000]),
    prefill_tokens_per_s=st.sampled_from([0.0, 0.1, 999.0, 1000.0]),
    decode_step_s=st.sampled_from([0.0, 0.02, 0.021]),
    transfer_bytes_per_s=st.sampled_from([0.0, 1.0, 1e8, 3e9]),
    cut_off=st.sampled_from([(), (), ("1",), ("0", "2", "5"), ("1", "3")]),
)
candidates_of = st.lists(
    st.tuples(
        st.sampled_from(get_args(Role)),
        loads,
        st.sampled_from([0, 0, 64, 640, 1000]),  # cached
        st.sampled_from(["kv", "kv", "kv", "other"]),
        st.sampled_from([0, 50_000, 50_001]),  # bytes per token
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(candidates_of, st.integers(1, 1000), st.text(max_size=3))
def test_the_choice_is_that_of_a_look_at_every_pair(
    described: list[tuple[Role, WorkerLoad, int, str, int]], num_tokens: int, name: str
) -> None:
    candidates = [
        worker(str(n), role, load, cached=min(cached, num_tokens), layout=layout, kv_bytes_per_token=size)
        for n, (role, load, cached, layout, size) in enumerate(described)
    ]
    wanted = request(num_tokens, request_id=name)
    decision = choose_cheapest(wanted, candidates)
    if all(candidate.record.role == "prefill" for candidate in candidates):
        assert decision is None
        return
    assert decision is not None
    prefill, decode, num_options = brute_force(wanted, candidates)
    assert (decision.prefill, decision.decode, decision.num_options) == (prefill, decode, num_options)
    assert choose_cheapest(wanted, candidates[::-1]) == decision

"""What a gateway submits, where a test doesn't care what is asked."""

from __future__ import annotations

from phloem.shared.protocol.session import SamplingParams, Submit

EPOCH = 7


def submit(request_id: str) -> Submit:
    """One prompt token, five to make, for a worker of `EPOCH`."""
    return Submit(
        request_id=request_id,
        attempt=1,
        epoch=EPOCH,
        phase="both",
        token_ids=[1],
        num_prompt_tokens=1,
        sampling=SamplingParams(max_tokens=5),
    )

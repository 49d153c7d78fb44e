"""Sampled stacks summed up by what their time was spent on."""

from __future__ import annotations

from collections import Counter

# The innermost frame that one of these names takes the sample; first match wins.
_LOOP = "event loop in C: sockets, timers, gRPC's threads"
_GROUPS = (
    (_LOOP, ("asyncio/runners.py",)),
    (
        "text: tokens to text, stop strings",
        ("services/gateway/text/detokenizer", "services/gateway/text/stop"),
    ),
    ("text: prompts to tokens", ("services/gateway/text/",)),
    ("events: JSON and SSE", ("_answers.py", "api/event", "msgspec")),
    ("cluster: messages to requests", ("services/gateway/cluster/",)),
    ("messages: gRPC and MessagePack", ("shared/rpc/", "shared/protocol/", "grpc/")),
    ("metrics", ("services/gateway/metrics", "prometheus_client/")),
    ("sequence: counts, times", ("services/gateway/sequence", "services/gateway/gateway.py")),
    ("HTTP: our layers", ("services/gateway/api/", "services/gateway/")),
    ("HTTP: uvicorn", ("uvicorn/",)),
    ("HTTP: Litestar", ("litestar/",)),
    ("asyncio: tasks, events, time limits", ("asyncio/", "contextlib")),
)


def by_group(stacks: str) -> Counter[str]:
    """Samples per group; `stacks` has a line "outer;...;inner COUNT" for each."""
    groups: Counter[str] = Counter()
    for line in stacks.splitlines():
        frames, _, count = line.rpartition(" ")
        groups[_group_of(frames.split(";"))] += int(count)
    return groups


def _group_of(frames: list[str]) -> str:
    for frame in reversed(frames):
        for group, names in _GROUPS:
            if any(name in frame for name in names):
                return group
    return _LOOP

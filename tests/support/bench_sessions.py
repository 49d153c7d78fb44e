"""Sessions of the bench client's datasets, and a trace of three requests."""

from __future__ import annotations

import itertools

from phloem.shared.bench.datasets.options import DatasetOptions
from phloem.shared.bench.datasets.registry import make_sessions
from phloem.shared.bench.prompt_source import make_source
from phloem.shared.bench.session import PromptKind, Session

MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 50, "hash_ids": [0, 1, 2]},
    {"timestamp": 2000, "input_length": 700, "output_length": 3, "hash_ids": [0, 3]},
    {"timestamp": 3000, "input_length": 600, "output_length": 9, "hash_ids": [0]},
]


def take(
    options: DatasetOptions, number: int, kind: PromptKind = "tokens", *, seed: int = 0
) -> list[Session]:
    return list(itertools.islice(make_sessions(options, make_source(kind, None), seed), number))

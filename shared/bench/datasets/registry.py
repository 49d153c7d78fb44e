"""From a dataset's name to its sessions."""

from __future__ import annotations

from collections.abc import Iterator

from phloem.shared.bench.datasets.files import jsonl_sessions, sharegpt_sessions
from phloem.shared.bench.datasets.options import DatasetOptions
from phloem.shared.bench.datasets.synthetic import (
    multi_turn_sessions,
    random_sessions,
    shared_prefix_sessions,
)
from phloem.shared.bench.datasets.traces import trace_sessions
from phloem.shared.bench.prompt_source import PromptSource
from phloem.shared.bench.session import Session
from phloem.shared.bench.token_counter import TokenCounter


def make_sessions(
    options: DatasetOptions, source: PromptSource, seed: int, counter: TokenCounter | None = None
) -> Iterator[Session]:
    """The dataset's sessions, without end where it is synthetic. Raises `ConfigError`, at the latest when
    the first is taken."""
    match options.name:
        case "random":
            return random_sessions(options, source, seed)
        case "shared-prefix":
            return shared_prefix_sessions(options, source, seed)
        case "multi-turn":
            return multi_turn_sessions(options, source, seed)
        case "trace":
            return trace_sessions(options, source, seed)
        case "sharegpt":
            return sharegpt_sessions(options, source, seed, counter)
        case "jsonl":
            return jsonl_sessions(options, source, seed)

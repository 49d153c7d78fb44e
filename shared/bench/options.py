"""Everything that a run was asked to do; it is recorded with the result."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import msgspec

from phloem.shared.bench.arrivals import Arrival, Rate
from phloem.shared.bench.datasets.options import DatasetOptions
from phloem.shared.bench.protocol import TargetSpec
from phloem.shared.bench.session import PromptKind
from phloem.shared.bench.slo import Objective
from phloem.shared.errors import ConfigError

TargetOrder: TypeAlias = Literal["alternate", "together"]


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How requests are sent. Rates are sessions per second, which are requests in single-turn datasets.

    With `first_rate` > 0 the loop is open (and `concurrency` > 0 caps what is in flight); else it is closed
    with `concurrency` places, unless the dataset has timestamps and `concurrency` is 0. A ramp goes from
    the first to the last value over `ramp_s`; 0: over the whole run. `duration_s` 0: until `num_prompts`.
    """

    concurrency: int = 0
    initial_concurrency: int = 0
    first_rate: float = 0.0
    last_rate: float = 0.0
    arrival: Arrival = "poisson"
    burst_size: int = 8
    ramp_s: float = 0.0
    duration_s: float = 0.0
    num_prompts: int = 0
    warmup_requests: int = 1

    @property
    def is_open(self) -> bool:
        return self.first_rate > 0

    def rate(self, *, num_sessions: int, duration_s: float) -> Rate:
        """The rate over one block of so many sessions or seconds (0: unknown)."""
        if self.first_rate == self.last_rate:
            return Rate(self.last_rate, self.last_rate)
        whole = duration_s or 2 * num_sessions / (self.first_rate + self.last_rate)
        return Rate(self.first_rate, self.last_rate, self.ramp_s or whole)


class SearchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The search for the highest rate that holds the SLO. A trial holds it when at least `share` of its
    requests are good. Rates are told apart down to `precision` (a share of the rate)."""

    share: float = 0.9
    precision: float = 0.05
    max_trials: int = 20


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run. With `order` "alternate" only one target is loaded at a time, in `num_rounds` rounds
    whose order of targets alternates; "together" loads all at once."""

    targets: tuple[TargetSpec, ...]
    dataset: DatasetOptions
    load: LoadOptions
    prompt_kind: PromptKind
    token_ids: tuple[int, int] | None = None  # [low, high) to draw random ids from
    tokenizer: str = ""
    seed: int = 0
    objectives: tuple[Objective, ...] = ()
    search: SearchOptions | None = None
    order: TargetOrder = "alternate"
    num_rounds: int = 1
    num_clients: int = 1
    timeout_s: float = 600.0
    allowed_failures: float = 0.0
    max_lag_ms: float | None = None
    flush_cache: bool = False
    save_text: bool = False

    def check(self) -> None:
        """Raises `ConfigError` for what doesn't go together."""
        load = self.load
        if not load.num_prompts and not load.duration_s:
            raise ConfigError("say how much to send: --num-prompts or --duration")
        if math.isinf(load.last_rate) and not load.num_prompts:
            raise ConfigError("--request-rate inf needs --num-prompts: it sends all of them at once")
        if self.num_clients < 1 or (load.concurrency and self.num_clients > load.concurrency):
            raise ConfigError("--clients must be from 1 to --concurrency")
        if len({target.name for target in self.targets}) < len(self.targets):
            raise ConfigError("each --target needs a name of its own")
        if self.search is not None and not self.objectives:
            raise ConfigError("--find-rate looks for the highest rate that holds --slo: give one")
        if self.search is not None and not load.is_open:
            raise ConfigError("--find-rate starts at --request-rate: give one")
        if self.num_rounds < 1 or (load.num_prompts and self.num_rounds > load.num_prompts):
            raise ConfigError("--rounds must be from 1 to --num-prompts")
        if not 0 <= self.allowed_failures < 1:
            raise ConfigError("--allow-failures is a share: 0.01 or 1%")

    def without_secrets(self) -> RunOptions:
        """As it may be written down: header values (API keys) are left out."""
        return msgspec.structs.replace(
            self,
            targets=tuple(
                msgspec.structs.replace(target, headers=tuple((name, "***") for name, _ in target.headers))
                for target in self.targets
            ),
        )

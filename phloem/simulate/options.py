"""What is simulated: frozen values, made of flags by `phloem.cli.simulate`."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite

import msgspec

from phloem.shared.block_hash import BLOCK_TOKENS
from phloem.shared.discovery.lease import HEARTBEAT_S
from phloem.shared.discovery.registry import POLL_INTERVAL_S
from phloem.shared.errors import ConfigError
from phloem.shared.worker.load_teller import INTERVAL_S
from phloem.simulate.workload import SimRequest


class StepModel(msgspec.Struct, frozen=True, kw_only=True):
    """How long an engine's step takes, in seconds; n tokens of a prompt chunk start at position p.

        prefill = fixed + n * per_token + n * (p + n / 2) * per_pair           (pairs: query x key)
        decode  = fixed + batch * per_sequence + context tokens * KV bytes / read bandwidth

    The defaults go through the points of docs/measurements for Llama-3.1-8B in bfloat16 on one H200:
    prefill of 512, 1,024 and 8,192 tokens (14.0, 25.2, 221.5 ms) exactly, decode steps (4.84, 5.45, 7.36
    and 23.78 ms) within 1%.
    """

    prefill_fixed_s: float = 3.22e-3
    prefill_token_s: float = 2.0678e-5
    prefill_pair_s: float = 1.457e-9
    decode_fixed_s: float = 4.80e-3
    decode_sequence_s: float = 5.5e-6
    kv_read_bytes_per_s: float = 3.91e12
    kv_bytes_per_token: int = 131_072  # 32 layers, 8 KV heads of 128, K and V, 2 bytes


class Delays(msgspec.Struct, frozen=True, kw_only=True):
    """Who learns of what how late, in seconds. The intervals are the cluster's own constants."""

    hop_s: float = 0.0005  # a message between two processes
    lookup_s: float = 0.002  # the gateway asks the index
    publish_s: float = 0.02  # from a tree's change until look-ups see it
    announce_ttl_s: float = 5.0  # as the index's --announce-ttl-s; 0: gateways don't tell each other
    heartbeat_s: float = HEARTBEAT_S
    tell_s: float = INTERVAL_S  # a worker tells gateways its load at most so often; 0: heartbeats only
    poll_s: float = POLL_INTERVAL_S
    transfer_bytes_per_s: float = 50e9  # of one prefill worker's sending side
    transfer_latency_s: float = 0.002


class ClusterShape(msgspec.Struct, frozen=True, kw_only=True):
    """How many of what. `kv_tokens` is one worker's KV memory: what an H200 has left beside 8B weights.

    `grain` tokens of a request are one unit of the simulated engine: it hashes, matches, stores, schedules
    and decodes units, each a 'token' to the real code. Everything outside the engine counts in tokens.
    """

    num_prefill: int = 8
    num_decode: int = 8
    num_unified: int = 0
    num_gateways: int = 1
    kv_tokens: int = 800_000
    page_tokens: int = 512
    chunk_tokens: int = 8192
    max_running: int = 256
    grain: int = 8

    @property
    def num_workers(self) -> int:
        return self.num_prefill + self.num_decode + self.num_unified

    @property
    def page_units(self) -> int:
        return self.page_tokens // self.grain

    @property
    def num_pages(self) -> int:
        """KV pages of one worker."""
        return self.kv_tokens // self.page_tokens

    def check(self) -> None:
        """Raises `ConfigError` for what can't be simulated."""
        if min(self.num_prefill, self.num_decode, self.num_unified) < 0:
            raise ConfigError("there are no fewer than 0 workers of a role")
        if self.num_decode + self.num_unified < 1:
            raise ConfigError("no worker can decode: give --decode or --unified")
        if min(self.num_gateways, self.grain, self.max_running) < 1:
            raise ConfigError("--gateways, --grain and --max-running start at 1")
        if (
            self.page_tokens < self.grain
            or self.page_tokens % self.grain
            or BLOCK_TOKENS % max(1, self.page_units)
        ):
            raise ConfigError(f"--page-tokens must be 1, 2, 4, ... {BLOCK_TOKENS} times --grain")
        if self.num_pages < 1 or self.chunk_tokens < self.grain:
            raise ConfigError("--kv-tokens holds no page, or --chunk-tokens no unit")

    def check_fits(self, requests: Iterable[SimRequest]) -> None:
        """Raises `ConfigError` when one of them would not fit a worker that has nothing else."""
        for request in requests:
            num_units = -(-request.num_tokens // self.grain) + request.answer_units(self.grain)
            if num_units > self.num_pages * self.page_units:
                num_tokens = request.num_tokens + request.num_output_tokens
                raise ConfigError(
                    f"request {request.index} has {num_tokens} tokens with its answer, and a worker's "
                    f"--kv-tokens are {self.kv_tokens}"
                )


class SimulationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One run. `rate_scale` divides the trace's gaps; `seed` spreads requests over gateways and phases."""

    policy: str = "cost"
    shape: ClusterShape = ClusterShape()
    steps: StepModel = StepModel()
    delays: Delays = Delays()
    rate_scale: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raises `ConfigError` for what can't be simulated."""
        self.shape.check()
        numbers = {"rate_scale": self.rate_scale} | msgspec.structs.asdict(self.steps)
        for name, number in (numbers | msgspec.structs.asdict(self.delays)).items():
            # These divide, or are the time after which something happens again.
            must_be_more = name in ("rate_scale", "heartbeat_s", "poll_s") or name.endswith("bytes_per_s")
            if not isfinite(number) or number < 0 or (must_be_more and number == 0):
                least = "more than 0" if must_be_more else "0 or more"
                raise ConfigError(f"--{name.replace('_', '-')} is {number:g}: it must be {least}")

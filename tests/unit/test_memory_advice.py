"""Whoever does what the sentences say gets an engine that starts, or one that says that none can.

The stages of a start run for real over a device that is not there, and holds what the 8B shape would take.
"""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from phloem.shared.engine import loading
from phloem.shared.engine.config import EngineOptions
from phloem.shared.engine.loading import ModelLoading
from phloem.shared.engine.memory import DeviceMemory
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.runners import for_device
from phloem.shared.errors import PhloemError

CUDA = torch.device("cuda:0")
LLAMA = Path(__file__).parents[2] / "benchmarks/models/llama-3.1-8b"
GB, MB = 10**9, 2**20
WEIGHTS = 16_060_522_496
TOTAL = 85 * GB
PAGE_BYTES = 16 * 131_072
TOKEN_BYTES = 90_000  # as measured, rather than as estimated: of a chunk's activations
ROW_BYTES = 7 * 128_256  # and of a row's sampling with filters
GRAPH_ROW_BYTES = 1_400_000
FLAGS = {
    "chunked-prefill-size": "chunked_prefill_size",
    "max-running-requests": "max_running_requests",
    "cuda-graph-max-bs": "cuda_graph_max_bs",
    "max-total-tokens": "max_total_tokens",
    "transfer-peers": "transfer_peers",
}


class Held:
    pass


class Device:
    """Of 85 GB, with so much free beside the weights; what is taken is held as long as it lives."""

    def __init__(self, free_beside: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.own = free_beside + WEIGHTS, 0
        monkeypatch.setattr(loading, "pick_backend", lambda *args: "triton")
        monkeypatch.setattr(loading, "count_parameters", lambda config: WEIGHTS // 2)
        monkeypatch.setattr(loading, "load_decoder", lambda *args, **kwargs: self.take(WEIGHTS))
        monkeypatch.setattr(loading, "build_runner", self.build_runner)
        monkeypatch.setattr(loading, "warm_up_runner", self.warm_up)
        monkeypatch.setattr(
            KVCache, "allocate", lambda config, num_pages, *args: self.take(num_pages * PAGE_BYTES)
        )

    def read(self) -> DeviceMemory:
        return DeviceMemory("GPU", TOTAL, self.free, self.own)

    def release(self) -> None:
        """What nobody holds is free already."""

    def take(self, num_bytes: int) -> Any:
        if num_bytes > self.free:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        held = Held()
        self._move(num_bytes)
        weakref.finalize(held, self._move, -num_bytes)
        return held

    def build_runner(self, options: EngineOptions, *args: object) -> Any:
        runner = self.take(420 * MB)
        runner.graphs = self.take(GRAPH_ROW_BYTES * options.cuda_graph_max_bs)
        return runner

    def warm_up(self, options: EngineOptions, model: object, runner: Any) -> None:
        runner.chunk = self.take(TOKEN_BYTES * options.chunked_prefill_size)
        runner.rows = self.take(max(0, ROW_BYTES * options.max_running_requests - self._chunk(options)))

    def _chunk(self, options: EngineOptions) -> int:
        return TOKEN_BYTES * options.chunked_prefill_size  # which the sampling's tensors take over

    def _move(self, num_bytes: int) -> None:
        self.free -= num_bytes
        self.own += num_bytes


def start(options: EngineOptions, free_beside: int) -> int:
    """Pages of the pool. Raises what the user reads."""
    with pytest.MonkeyPatch.context() as patch:
        device = Device(free_beside, patch)
        model, _ = ModelLoading(for_device(options, CUDA), CUDA, lambda message: None, device).run()
        return model.num_pages


def obey(options: EngineOptions, message: str) -> EngineOptions:
    """The first advice of a sentence, done."""
    if share := re.search(r"raise it to (0\.\d+)", message):
        return msgspec.structs.replace(options, mem_fraction_static=float(share[1]))
    advice = re.split(r"(?<!-)\b(?:lower|give) (?=--|it)", message)[-1].partition(", ")[0]
    found = re.findall(r"--([a-z-]+) (?:to )?(\d+)", advice)
    assert found, f"no number to change in: {message}"
    return msgspec.structs.replace(options, **{FLAGS[flag]: int(value) for flag, value in found})


@pytest.mark.parametrize("peers", [1, 2, 8])
@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"chunked_prefill_size": 65_536},
        {"max_running_requests": 2048},
        {"mem_fraction_static": 0.3},
    ],
    ids=lambda wanted: "-".join(wanted) or "defaults",
)
def test_advice_that_is_followed_leads_to_a_start(wanted: dict[str, Any], peers: int) -> None:
    for tenths in (*range(1, 130), 200, 680):
        free = tenths * GB // 10
        options = EngineOptions(model_path=str(LLAMA), load_format="dummy", transfer_peers=peers, **wanted)
        said: list[str] = []
        while True:
            try:
                assert start(options, free) >= 2
                break
            except PhloemError as error:
                message = str(error)
            assert message not in said and len(said) < 2, f"{free / GB} GB free: {[*said, message]}"
            said.append(message)
            if ": stop what else uses the device (" in message:
                assert len(said) == 1 and free < 3 * GB, f"promised before: {said}"
                break
            options = obey(options, message)

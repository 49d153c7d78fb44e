"""Where the engines of the proofs run, and what their model is."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from phloem.cli.up.devices import count_gpus
from phloem.shared.engine.config import EngineOptions
from phloem.shared.protocol.cluster import Role
from phloem.shared.transfer_bench.models import ModelShape, write_model, write_weights

VOCABULARY: dict[ModelShape, int] = {"exact": 512, "tiny": 256}
TRANSFER_TIMEOUT_S = 2.0


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """Where the engines run; `gpus` of the prefill and the decode side, or None for CPUs."""

    shape: ModelShape
    gpus: tuple[int, int] | None
    options: EngineOptions

    @property
    def vocabulary(self) -> int:
        return VOCABULARY[self.shape]

    @property
    def longest_prompt(self) -> int:
        """Attention of one such prompt takes a CPU core some seconds."""
        return 2000 if self.gpus is None else 16_000

    def gpu(self, role: Role) -> int | None:
        """A unified engine sits beside the decode engine."""
        return None if self.gpus is None else self.gpus[role != "prefill"]


def make_setting(device: str, gpus: str, folder: Path) -> Setting:
    cuda = device == "cuda" or (device == "auto" and count_gpus(os.environ) >= 2)
    first, second = (int(number) for number in gpus.split(","))
    shape: ModelShape = "exact" if cuda else "tiny"
    model = write_weights(write_model(shape, folder / "model"))
    options = EngineOptions(
        model_path=str(model),
        dtype="float32",
        num_threads=4 if cuda else 1,
        max_total_tokens=131_072 if cuda else 16_384,
        max_running_requests=32,
        cuda_graph_max_bs=16,
        transfer_timeout_s=TRANSFER_TIMEOUT_S,
    )
    return Setting(shape=shape, gpus=(first, second) if cuda else None, options=options)

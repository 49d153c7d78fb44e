"""What the engine would do with each GPU of this machine: `python -m phloem.shared.engine.gpu_report`.

One JSON line per GPU on standard output, for `phloem doctor`, which never imports torch itself.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import torch


class GpuReport(msgspec.Struct, frozen=True):
    """`backend` is what a bfloat16 model with a head_dim of 128 gets, with `notes`; "" and one note when the
    engine refuses the device."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    backend: str
    notes: tuple[str, ...]


def report_gpus() -> list[GpuReport]:
    """Every CUDA device that this process sees."""
    import torch

    return [_report(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]


def _report(device: torch.device) -> GpuReport:
    import torch

    from phloem.shared.engine.backend import ModelFacts, Refusal, choose_backend, decode_fallback
    from phloem.shared.engine.config import EngineOptions
    from phloem.shared.engine.gpu_facts import find_gpu_facts

    model = ModelFacts("bfloat16", 128)
    facts = find_gpu_facts(device, model)
    chosen = choose_backend("auto", facts, model)
    slower = decode_fallback(EngineOptions(), facts, model)
    notes = () if isinstance(chosen, Refusal) else (*chosen.notes, *([slower] if slower else []))
    free, total = torch.cuda.mem_get_info(device)
    return GpuReport(
        facts.name,
        facts.capability,
        total,
        free,
        "" if isinstance(chosen, Refusal) else chosen.backend,
        (chosen.message,) if isinstance(chosen, Refusal) else notes,
    )


def main() -> int:
    for report in report_gpus():
        print(msgspec.json.encode(report).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

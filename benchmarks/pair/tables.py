"""How large everything is that is measured of a pair, on GPUs and on a CPU."""

from __future__ import annotations

from pathlib import Path

import msgspec

from phloem.shared.model_store.shapes import write_shape
from phloem.shared.transfer_bench.models import write_model

LLAMA = Path(__file__).parents[1] / "models" / "llama-3.1-8b"


class OpenLoop(msgspec.Struct, frozen=True):
    """Poisson arrivals, and what they have to keep; 0: told, not judged."""

    input_tokens: int
    output_tokens: int
    rate: float
    num_prompts: int
    max_itl_p99_ms: float
    max_ttft_p50_ms: float
    max_tpot_p50_ms: float = 0.0


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of everything; `is_judged` where the bars are meant for the hardware."""

    model: str
    up_flags: tuple[str, ...]
    token_ids: tuple[int, int]
    long_tokens: int
    num_long: int
    streams: int
    stream_input: int
    stream_output: int
    rounds: int
    open_loops: tuple[OpenLoop, ...]
    is_judged: bool


def gpu_table() -> Table:
    return Table(
        model=str(LLAMA),
        up_flags=("--load-format", "dummy", "--dtype", "bfloat16", "--context-length", "32768"),
        token_ids=(1000, 120_000),
        long_tokens=8192,
        num_long=10,
        streams=32,
        stream_input=1024,
        stream_output=800,
        rounds=2,
        open_loops=(
            OpenLoop(4096, 256, 4.0, 80, 9.0, 145.0, 5.6),
            OpenLoop(1024, 256, 16.0, 240, 10.0, 50.0),
        ),
        is_judged=True,
    )


def cpu_table(folder: Path) -> Table:
    shape = write_model("tiny", folder / "shape")
    write_shape((shape / "config.json").read_bytes(), folder / "tiny")
    return Table(
        model=str(folder / "tiny"),
        up_flags=("--load-format", "dummy", "--device", "cpu", "--context-length", "4096"),
        token_ids=(10, 250),
        long_tokens=256,
        num_long=4,
        streams=4,
        stream_input=32,
        stream_output=400,
        rounds=2,
        open_loops=(OpenLoop(128, 16, 2.0, 8, 0.0, 0.0),),
        is_judged=False,
    )

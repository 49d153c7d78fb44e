"""What the flags of `phloem bench offline` ask for, and how wrong ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from phloem.cli.bench.offline_flags import (
    EngineFlags,
    OfflineShapes,
    WorkFlags,
    engine_options,
    offline_shapes,
)
from phloem.cli.main import run
from phloem.shared.errors import PhloemError

SHAPE = Path(__file__).parents[2] / "benchmarks" / "models" / "llama-3.1-8b"


def test_shapes_are_lengths_and_batches() -> None:
    flags = WorkFlags(prefill="512,1024", decode="1x64,8x128", steps=12, grammar_share=0.5)
    assert offline_shapes(flags) == OfflineShapes([512, 1024], [(1, 64), (8, 128)], 12, 0.5)
    assert offline_shapes(WorkFlags(prefill="", decode="")).prefill_lengths == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prefill", "x"], "--prefill: 'x' is no positive number"),
        (["--prefill", "0"], "--prefill: '0' is no positive number"),
        (["--decode", "64"], "--decode: '64' is not BATCHxCONTEXT, as 64x1024 is"),
        (["--decode", "0x64"], "--decode: '0' is no positive number"),
        (["--steps", "0"], "--steps: '0' is no positive number"),
        (["--grammar-share", "2"], "--grammar-share 2.0 is no share"),
    ],
)
def test_a_wrong_flag_is_named_before_anything_is_loaded(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "offline", "--model-path", "/nope", *args]) == 2
    assert message in capsys.readouterr().err


def test_a_shape_without_weights_gets_random_ones() -> None:
    assert engine_options(EngineFlags(model_path=str(SHAPE))).load_format == "dummy"


def test_a_format_that_was_asked_for_is_not_guessed_at() -> None:
    with pytest.raises(PhloemError, match="give --load-format dummy"):
        engine_options(EngineFlags(model_path=str(SHAPE), load_format="safetensors"))

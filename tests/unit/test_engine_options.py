"""Flags of an engine that contradict each other: refused when they are read, before torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from phloem.shared.engine.config import EngineConfig, EngineOptions, engine_config
from phloem.shared.telemetry.logs import LogOptions


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"page_size": 3}, "--page-size 3 must divide 64"),
        ({"page_size": 48}, "--page-size 48 must divide 64"),
        ({"device": "cpu", "attention_backend": "flashinfer"}, "needs a CUDA device"),
        ({"device": "cpu", "attention_backend": "triton"}, "needs a CUDA device"),
        ({"dtype": "float32", "attention_backend": "flashinfer"}, "no float32 kernels"),
    ],
)
def test_flags_that_contradict_each_other_are_refused_when_they_are_read(
    flags: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        EngineOptions(**flags)  # type: ignore[arg-type]


def test_the_command_line_refuses_a_page_size_without_importing_torch() -> None:
    program = (
        "import sys; from phloem.cli.main import run; code = run(['serve', 'unified', '--page-size', '3']); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "--page-size 3 must divide 64: give 1, 2, 4, 8, 16, 32 or 64" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_is_told_how_to_log() -> None:
    config = EngineConfig(
        worker_id="w",
        epoch=1,
        role="unified",
        host="127.0.0.1",
        cluster_secret=b"",
        options=EngineOptions(),
        logs=LogOptions(log_level="debug", log_format="json"),
    )
    assert engine_config.decode(engine_config.encode(config)).logs == config.logs

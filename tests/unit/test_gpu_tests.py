"""`make test-gpu` where there is no GPU: all of it is skipped, and says what to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_every_test_for_one_is_skipped_with_a_remedy() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "gpu", "tests/gpu"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:]
    assert re.fullmatch(r"\d+ skipped in .*", run.stdout.strip().splitlines()[-1])
    device = [line for line in run.stdout.splitlines() if "test_cuda_page_attention.py" in line]
    assert device and all("make test-gpu VENV=" in line or "nvidia-smi" in line for line in device)

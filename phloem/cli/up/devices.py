"""Which GPUs this machine has, without importing torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

_DEVICE_FILE = re.compile(r"nvidia(\d+)")


def count_gpus(environ: Mapping[str, str], device_dir: Path = Path("/dev")) -> int:
    """NVIDIA devices that a process started here sees; `CUDA_VISIBLE_DEVICES` limits them."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return sum(1 for path in device_dir.glob("nvidia*") if _DEVICE_FILE.fullmatch(path.name))

"""How much memory a process, or everything on a GPU, holds."""

from __future__ import annotations

import subprocess
from pathlib import Path

from phloem.shared.errors import PhloemError

_TIMEOUT_S = 20.0


def resident_mib(pid: int) -> float:
    """Main memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise PhloemError("bench_failed", f"/proc/{pid}/status has no VmRSS")


def gpu_used_mib(index: int) -> float:
    """Memory in use on the host's GPU number `index`, by whoever."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", str(index)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise PhloemError("bench_failed", f"nvidia-smi does not tell: {error}") from error
    return float(done.stdout.split()[0])


def growth_mib(samples: list[float]) -> float:
    """How much the later samples lie above the early ones: the lowest of the last third less the lowest of
    the first, without the very first sample, which pays for what is made once.

    The lowest, since a channel that was just lost may hold its buffers for a moment more; what is leaked
    lifts the lowest, too. Samples are to be taken with the same channels open.
    """
    third = max(1, len(samples) // 3)
    rest = samples[1 : 1 + third]
    return min(samples[-third:]) - min(rest) if rest else 0.0

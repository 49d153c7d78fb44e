"""The environment of an engine process: thread counts are set so that processes don't fight over cores."""

from __future__ import annotations

import os
from collections.abc import Mapping

# Threads that wait for work must sleep, not spin: other engines share the cores.
_PASSIVE = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def usable_cores() -> int:
    """Cores that this process may run on."""
    return max(1, len(os.sched_getaffinity(0)))


def engine_environment(num_threads: int, base: Mapping[str, str]) -> dict[str, str]:
    """`base` with the thread settings of an engine of `num_threads` (0: all usable cores)."""
    threads = str(num_threads or usable_cores())
    counts = {
        name: threads
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    }
    return {**base, **_PASSIVE, **counts}

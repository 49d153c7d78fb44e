"""On what a run was made: a figure without its machine and versions can't be compared with another."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import msgspec

import phloem

_PACKAGES = ("uvloop", "httptools", "msgspec", "torch", "transformers")
_COMMAND_TIMEOUT_S = 5.0


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """The client's machine and software. `load_average` is the 1-minute one when the run began: a busy
    machine measures itself. `gpus` are those of this machine, which the server may share."""

    phloem_version: str
    commit: str
    python: str
    packages: dict[str, str]
    system: str
    cpu: str
    num_cores: int
    usable_cores: int
    memory_gib: float
    gpus: list[str]
    load_average: float


def read_environment() -> Environment:
    """Takes some tens of milliseconds; what can't be found out is empty."""
    return Environment(
        phloem_version=phloem.__version__,
        commit=_commit(),
        python=platform.python_version(),
        packages={name: version for name in _PACKAGES if (version := _version(name))},
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_model(),
        num_cores=os.cpu_count() or 0,
        usable_cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        gpus=_gpus(),
        load_average=round(os.getloadavg()[0], 2),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _commit() -> str:
    """The commit that this code is of, with "+" when files were changed since; "" outside a checkout."""
    source = str(Path(__file__).resolve().parent)
    head = _output(["git", "-C", source, "rev-parse", "--short=12", "HEAD"])
    if not head:
        return ""
    return head + ("+" if _output(["git", "-C", source, "status", "--porcelain", "-uno"]) else "")


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return _output(query).splitlines()


def _output(argv: list[str]) -> str:
    if shutil.which(argv[0]) is None:
        return ""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

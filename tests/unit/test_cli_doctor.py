"""What `phloem doctor` finds."""

from __future__ import annotations

import pytest

from phloem.cli.doctor import check_gpus, check_port, check_python, check_redis
from phloem.cli.main import run
from phloem.cli.up.ports import bound_socket, free_port


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


def test_machine_without_a_gpu_is_no_problem() -> None:
    assert check_gpus(0).verdict == "note"
    assert check_gpus(2) == ("GPUs", "ok", "2")


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

"""Service entry, exit codes, and children that can't outlive their parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from phloem.shared.lifecycle.child_process import spawn_child
from tests.support.waiting import wait_until_gone

DEADLINE_S = 15.0


def run_program(source: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SERVICE = """
    import asyncio, sys
    from phloem.shared.errors import ConfigError, PhloemError
    from phloem.shared.lifecycle.service import run_service, stop_event

    async def main():
    {body}

    sys.exit(run_service(main, service="test"))
"""


def run_body(body: str) -> subprocess.Popen[str]:
    source = textwrap.dedent(SERVICE).replace("{body}", textwrap.indent(textwrap.dedent(body), "    "))
    return run_program(source)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        ("ConfigError('--port: is taken')", 2, "phloem: error: --port: is taken"),
        ("PhloemError('lost', 'Redis is gone')", 1, "phloem: error: Redis is gone"),
        ("ExceptionGroup('tasks', [PhloemError('lost', 'peer is gone')])", 1, "phloem: error: peer is gone"),
    ],
)
def test_typed_error_is_one_line_and_an_exit_code(raised: str, code: int, line: str) -> None:
    out, err = (process := run_body(f"raise {raised}")).communicate(timeout=DEADLINE_S)
    assert (process.returncode, out, err.strip()) == (code, "", line)


def test_a_bug_is_logged_with_its_traceback() -> None:
    _, err = (process := run_body("raise ZeroDivisionError('oops')")).communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "ZeroDivisionError: oops" in err


def test_returning_exits_with_zero() -> None:
    process = run_body("print('done')")
    assert process.communicate(timeout=DEADLINE_S) == ("done\n", "")
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_first_signal_sets_the_stop_event(number: signal.Signals) -> None:
    process = run_body("""
        stop = stop_event()
        print("up", flush=True)
        await stop.wait()
        print("drained", flush=True)
    """)
    assert first_line(process) == "up"
    process.send_signal(number)
    assert process.communicate(timeout=DEADLINE_S) == ("drained\n", "")
    assert process.returncode == 0


def test_second_signal_cancels_a_drain() -> None:
    process = run_body("""
        stop = stop_event()
        print("up", flush=True)
        await stop.wait()
        print("draining", flush=True)
        await asyncio.sleep(600)
    """)
    assert first_line(process) == "up"
    process.terminate()
    assert first_line(process) == "draining"
    process.terminate()
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0


def test_service_without_a_stop_event_is_cancelled() -> None:
    process = run_body("""
        print("up", flush=True)
        try:
            await asyncio.sleep(600)
        finally:
            print("cleaned", flush=True)
    """)
    assert first_line(process) == "up"
    process.terminate()
    assert process.communicate(timeout=DEADLINE_S) == ("cleaned\n", "")
    assert process.returncode == 0


async def test_stop_returns_the_childs_own_exit_code() -> None:
    program = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *a: sys.exit(7))
print("up", flush=True)
time.sleep(600)
"""
    child = await spawn_child("c", [sys.executable, "-c", program], stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    assert await child.stdout.readline() == b"up\n"
    assert await child.stop(DEADLINE_S) == 7


async def test_stop_kills_the_whole_group_after_the_bound() -> None:
    program = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
time.sleep(600)
"""
    child = await spawn_child("c", [sys.executable, "-c", program], stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    grandchild = int(await child.stdout.readline())
    assert await child.stop(0.1) == -signal.SIGKILL
    wait_until_gone(grandchild)


async def test_missing_program_exits_with_127() -> None:
    child = await spawn_child("c", ["/no/such/program"], stderr=asyncio.subprocess.DEVNULL)
    assert await child.wait() == 127


async def test_spawn_is_refused_off_the_main_thread() -> None:
    def elsewhere() -> None:
        asyncio.run(spawn(["true"]))

    async def spawn(argv: list[str]) -> None:
        await spawn_child("c", argv)

    with pytest.raises(RuntimeError, match="main thread"):
        await asyncio.to_thread(elsewhere)


def test_child_and_grandchild_die_with_a_killed_parent(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(
        textwrap.dedent("""
        import asyncio, os, sys
        from phloem.shared.lifecycle.child_process import spawn_child

        async def main(depth):
            print(os.getpid(), flush=True)
            if depth:
                await spawn_child("c", [sys.executable, __file__, str(depth - 1)])
            await asyncio.sleep(600)

        asyncio.run(main(int(sys.argv[1])))
        """)
    )
    parent = subprocess.Popen([sys.executable, program, "2"], stdout=subprocess.PIPE, text=True)
    pids = [int(first_line(parent)) for _ in range(3)]
    parent.kill()
    parent.communicate(timeout=DEADLINE_S)
    for pid in pids:
        wait_until_gone(pid)


def test_child_of_a_parent_that_died_before_it_ran_exits() -> None:
    from phloem.shared.lifecycle import exec_child

    done = subprocess.run(
        [sys.executable, "-I", "-S", exec_child.__file__, str(os.getpid() + 1), "9", "echo", "ran"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stdout) == (1, "")

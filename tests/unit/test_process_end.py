"""How a process ends that has used a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

# What the interpreter would take apart at its own end, and a thread that it would wait for.
SCRIPT = """
import logging, os, signal, sys, threading
from phloem.shared.process_end import end_process

class Crashes:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGSEGV)

crashes = Crashes()
threading.Thread(target=threading.Event().wait).start()
logging.basicConfig(format="%(message)s", stream=sys.stderr)
logging.warning("the last words")
print("printed", end="")
end_process(int(sys.argv[1]))
"""


def run(code: int, **streams: Any) -> subprocess.CompletedProcess[str]:
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}  # so that something is left to be flushed
    arguments = [sys.executable, "-c", SCRIPT, str(code)]
    return subprocess.run(arguments, timeout=60, check=False, env=buffered, **streams)


@pytest.mark.parametrize("code", [0, 1])
def test_process_ends_with_its_own_code_whatever_is_left_in_it(code: int) -> None:
    done = run(code, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "printed", "the last words\n")


def test_process_ends_with_its_own_code_when_nobody_reads_it_any_more() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb", buffering=0) as pipe:
        assert run(3, stdout=pipe, stderr=pipe).returncode == 3

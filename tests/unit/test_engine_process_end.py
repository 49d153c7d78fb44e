"""How an engine's process ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What the interpreter would take apart at its own end, and a thread that it would wait for.
SCRIPT = """
import logging, os, signal, sys, threading
from phloem.shared.engine.main import end_process

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


@pytest.mark.parametrize("code", [0, 1])
def test_process_ends_with_its_own_code_whatever_is_left_in_it(code: int) -> None:
    arguments = [sys.executable, "-c", SCRIPT, str(code)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, "printed", "the last words\n")

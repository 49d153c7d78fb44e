"""Becomes another program that is killed when its parent dies. Run by path, with `python -I -S`.

    exec_child.py PARENT_PID SIGNAL PROGRAM [ARG...]

The kernel's parent-death signal survives exec, so this works for any program (Valkey too), and spares the
parent a `preexec_fn`, which is unsafe in a process with threads. Standard library only: it starts in
milliseconds. Exits with 127 when the program can't be run.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int, signal_number: int) -> None:
    """Asks the kernel to send this process `signal_number` when its parent dies; exits if it already has.

    "The parent" is the *thread* that forked: the caller of this process must have spawned it from a thread
    that lives as long as it does.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it died before prctl
        sys.exit(1)


def main(argv: list[str]) -> None:
    parent_pid, signal_number, program = int(argv[1]), int(argv[2]), argv[3]
    die_with_parent(parent_pid, signal_number)
    try:
        os.execvp(program, argv[3:])
    except OSError as error:
        print(f"can't run {program}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main(sys.argv)

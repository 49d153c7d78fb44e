"""A gateway that counts where its CPU time goes, by sampling: no call is slowed down.

    python -m benchmarks.gateway.profiled OUTPUT GATEWAY_FLAGS...

A SIGPROF comes every millisecond of CPU time of the process and notes the Python frames of the event loop's
thread. At the end OUTPUT gets one line per distinct stack, "outermost;...;innermost COUNT", as flame graph
tools take them. SIGUSR1 starts the counts anew. gRPC's own threads count towards whatever the loop does.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

from phloem.cli.main import main as cli

_INTERVAL_S = 0.001
_DEPTH = 40


class Sampler:
    def __init__(self) -> None:
        self._stacks: Counter[tuple[CodeType, ...]] = Counter()

    def start(self) -> None:
        signal.signal(signal.SIGPROF, self._sample)
        signal.signal(signal.SIGUSR1, lambda number, frame: self._stacks.clear())
        signal.setitimer(signal.ITIMER_PROF, _INTERVAL_S, _INTERVAL_S)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)

    def lines(self) -> list[str]:
        return [
            f"{';'.join(map(_name, reversed(stack)))} {count}" for stack, count in self._stacks.most_common()
        ]

    def _sample(self, number: int, frame: FrameType | None) -> None:
        stack: list[CodeType] = []
        while frame is not None and len(stack) < _DEPTH:
            stack.append(frame.f_code)
            frame = frame.f_back
        self._stacks[tuple(stack)] += 1


def _name(code: CodeType) -> str:
    path = code.co_filename.replace("\\", "/")
    for root in ("site-packages/", "/services/", "/shared/", "/lib/python"):
        _, found, tail = path.rpartition(root)
        if found:
            path = (root.strip("/") + "/" if root in ("/services/", "/shared/") else "") + tail
            break
    return f"{path}:{code.co_qualname}".replace(" ", "_").replace(";", ",")


def main() -> None:
    output, *flags = sys.argv[1:]
    sys.argv = ["phloem", "serve", "gateway", *flags]
    sampler = Sampler()
    sampler.start()
    try:
        cli()
    finally:
        sampler.stop()
        Path(output).write_text("\n".join(sampler.lines()))


if __name__ == "__main__":
    main()

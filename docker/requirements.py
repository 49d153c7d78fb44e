"""Prints what Phloem requires, one requirement a line, so that it can be installed before Phloem itself.

requirements.py PYPROJECT [EXTRA]
"""

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path


def requirements(project: dict, extra: str) -> Iterator[str]:
    """The base requirements and those of `extra`, which may name other extras as `phloem[OTHER]`."""
    yield from project["dependencies"]
    pending = [extra] if extra else []
    while pending:
        for requirement in project["optional-dependencies"][pending.pop()]:
            if requirement.startswith("phloem["):
                pending += requirement.removeprefix("phloem[").rstrip("]").split(",")
            else:
                yield requirement


if __name__ == "__main__":
    table = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
    print(*requirements(table, sys.argv[2] if len(sys.argv) > 2 else ""), sep="\n")

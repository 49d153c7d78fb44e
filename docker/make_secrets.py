"""Makes the secrets of a cluster once, in a folder that only its services can read."""

import os
import secrets
import sys
from pathlib import Path

NAMES = ("redis-password", "cluster-secret")


def main(folder: Path) -> None:
    """A secret is written beside its place and renamed, so that nobody reads half of one."""
    for name in NAMES:
        target = folder / name
        if target.exists():
            continue
        partial = folder / f".{name}"
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32))
        partial.rename(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What a run needs that has GPUs, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from phloem.shared.process_end import end_process

_STATUS = pytest.StashKey[int]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here needs a CUDA device; those that need more say so themselves."""
    reason = _without_device()
    if reason is None:
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


def _without_device() -> str | None:
    """Why nothing here can run, and what to do about it."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA: `make test-gpu VENV=.venv-gpu` makes an "
            "environment of its own with one"
        )
    return "torch sees no CUDA device: nvidia-smi tells whether the driver does"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """With the run's own status. After tests whose peers were killed or stopped, Python's last garbage
    collection crashed (torch 2.11, 2 x H200: all tests passed, status 139); which object it was is not known.
    Engines do not get there either."""
    if _STATUS in config.stash and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        end_process(config.stash[_STATUS])

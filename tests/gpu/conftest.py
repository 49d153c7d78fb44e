"""How a run with GPUs ends."""

from __future__ import annotations

import pytest
import torch

from phloem.shared.process_end import end_process

_STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """With the run's own status. After tests whose peers were killed or stopped, Python's last garbage
    collection crashed (torch 2.11, 2 x H200: all tests passed, status 139); which object it was is not known.
    Engines do not get there either."""
    if _STATUS in config.stash and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        end_process(config.stash[_STATUS])

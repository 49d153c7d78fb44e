"""Fixtures that several kinds of tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phloem.shared.model_store.resolve import default_cache_dir, resolve_model

# Triton reads it when a kernel is defined, so it must be set before any test imports one.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The demo model as a Hugging Face directory, fetched and converted on the first use of the cache."""
    return resolve_model("smollm2-135m-instruct", cache_dir=default_cache_dir())

"""`scripts/venv.sh`: each kind of environment gets its extras, once, and holds the smaller kinds."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/venv.sh"


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment whose Python notes what it is asked for, and does nothing."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    python.chmod(0o755)
    return tmp_path / "venv"


def run(venv: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"VENV": str(venv)}
    return subprocess.run(
        [SCRIPT, *arguments], env=env, text=True, capture_output=True, timeout=20, check=False
    )


def installed(venv: Path, *kinds: str) -> list[str]:
    """What pip was asked for."""
    for kind in kinds:
        assert run(venv, kind).returncode == 0
    return [line.split()[-1] for line in (venv.parent / "asked").read_text().splitlines()]


def test_an_environment_for_gpus_has_flashinfer_and_what_developers_need(venv: Path) -> None:
    assert installed(venv, "gpu", "gpu", "dev", "engine") == [".[dev,gpu]"]


def test_an_environment_grows_by_what_it_lacks(venv: Path) -> None:
    assert installed(venv, "engine", "dev", "engine", "gpu", "dev") == [".[engine]", ".[dev]", ".[dev,gpu]"]


@pytest.mark.parametrize("arguments", [(), ("cuda",)])
def test_another_word_installs_nothing(arguments: tuple[str, ...], venv: Path) -> None:
    ended = run(venv, *arguments)
    assert ended.returncode == 1 and "usage: scripts/venv.sh engine|dev|gpu" in ended.stderr
    assert not (venv.parent / "asked").exists()


def test_only_the_targets_for_gpus_install_for_gpus() -> None:
    """A CPU build of torch is enough for all others."""
    rules = (SCRIPT.parents[1] / "Makefile").read_text().splitlines()
    needs = {line.partition(":")[0] for line in rules if "install-gpu" in line.partition("#")[0].split()[1:]}
    assert needs == {".PHONY", "test-gpu"}

"""What can't start says so in one sentence, with the number that is too large, and ends; nothing is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.valkey import ValkeyServer, free_port, running_valkey

# Two terabytes in bfloat16: too large for whoever runs this.
HUGE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 65_536,
    "intermediate_size": 262_144,
    "num_attention_heads": 512,
    "num_hidden_layers": 16,
    "num_key_value_heads": 64,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "vocab_size": 100,
    "phloem_made_up_tokenizer": True,
}
TIMEOUT_S = 90


@pytest.fixture
def huge_model(tmp_path: Path) -> Path:
    directory = tmp_path / "huge"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(HUGE))
    return directory


def phloem(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "phloem.cli.main", *arguments],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def serve(valkey: ValkeyServer, *flags: str) -> subprocess.CompletedProcess[str]:
    return phloem("serve", "unified", "--device", "cpu", *flags, env={"PHLOEM_REDIS_URL": valkey.url})


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The error, which is one line, the last one, and no traceback."""
    assert "Traceback" not in done.stderr
    *before, last = done.stderr.strip().splitlines()
    assert last.startswith("phloem: error: ")
    assert not any(line.startswith("phloem: error: ") for line in before)
    return last.removeprefix("phloem: error: ")


def test_weights_that_do_not_fit_end_a_worker_with_their_size(huge_model: Path) -> None:
    with running_valkey() as valkey:
        done = serve(
            valkey,
            *("--model-path", str(huge_model), "--load-format", "dummy", "--dtype", "bfloat16"),
            *("--log-format", "json"),
        )
    assert done.returncode == 1
    words = last_words(done)
    assert words.startswith("the weights need 1958.5 GB in bfloat16, but this machine has")
    assert words.endswith("a smaller model")
    lines = [json.loads(line) for line in done.stderr.strip().splitlines()[:-1]]
    assert {"unified"} < {line["service"].split()[0] for line in lines} <= {"unified", "engine"}


def test_pool_without_room_ends_a_worker_with_what_to_give(smollm2_dir: Path) -> None:
    with running_valkey() as valkey:
        done = serve(valkey, "--model-path", str(smollm2_dir), "--max-total-tokens", "20")
    assert done.returncode == 1
    assert "--max-total-tokens 64 or more" in last_words(done)


def test_context_over_the_models_is_a_configuration_error(smollm2_dir: Path) -> None:
    with running_valkey() as valkey:
        done = serve(valkey, "--model-path", str(smollm2_dir), "--context-length", "9000")
    assert done.returncode == 2
    assert last_words(done) == "--context-length 9000 is over the model's 8192"


def test_up_tells_the_workers_own_sentence_and_leaves_nothing(huge_model: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    done = phloem(
        *("up", "--once", "--port", str(free_port()), "--run-dir", str(tmp_path / "run")),
        *("--model-path", str(huge_model), "--load-format", "dummy"),
    )
    assert done.returncode == 1
    words = last_words(done)
    assert ": the weights need" in words and f"(its log: {tmp_path / 'run'}" in words
    assert "starts again" not in done.stdout
    assert time.monotonic() - began < 60
    left = [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if str(tmp_path) in " ".join(process.info["cmdline"] or [])
    ]
    assert left == []

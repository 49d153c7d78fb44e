"""The command line: help without heavy imports, readable refusals, exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from phloem.cli.main import run


def phloem(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "phloem.cli.main", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "HOME": "/root", **(env or {})},
    )


def modules_after(*args: str) -> set[str]:
    """Top-level modules that are loaded once `phloem ARGS` has run."""
    code = f"import sys; from phloem.cli.main import run; run({list(args)!r}); print('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return set(done.stdout.rpartition("MODULES ")[2].split())


def test_a_usage_error_points_at_the_commands_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    for args, command in ((["up", "--prefil", "2"], "phloem up"), (["nope"], "phloem")):
        assert run(args) == 2
        assert f"See `{command} --help`." in capsys.readouterr().err


def test_help_lists_the_commands_and_imports_no_service() -> None:
    modules = modules_after("--help")
    assert "phloem.cli.main" in modules
    assert not [
        name for name in modules if name.startswith(("phloem.services.", "torch", "litestar", "grpc"))
    ]
    assert "Start a whole cluster" in phloem("--help").stdout


@pytest.mark.parametrize("service", ["gateway", "cache-index", "prefill"])
def test_help_of_a_service_shows_its_flags_and_imports_no_torch(service: str) -> None:
    help_text = phloem("serve", service, "--help").stdout
    assert "--redis-url" in help_text
    assert "--no-" not in help_text or service != "cache-index", "it has no switches"
    modules = modules_after("serve", service, "--help")
    assert not modules & {"torch", "transformers", "numpy"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["serve", "gateway", "--prot", "3"], "Unknown option: --prot. Did you mean --port?"),
        (
            ["serve", "gateway", "--port", "99999"],
            "--port: '99999' is not valid: expected an integer from 0 to",
        ),
        (
            ["serve", "prefill", "--page-size", "0"],
            "--page-size: '0' is not valid: expected an integer from 1 to",
        ),
        (["serve", "decode", "--dtype", "float3"], "Did you mean float32?"),
        (["serve", "decode", "--config", "/no/such.toml"], "can't read the configuration file /no/such.toml"),
        (["up", "--prefill", "0"], "a cluster needs --prefill and --decode of at least 1 each"),
        (
            ["bench", "transfer", "--device", "cpu", "-o", "/nope/x.json"],
            "/nope/x.json: there is no such directory",
        ),
        (["bench", "serve", "--target", "x=http://127.0.0.1:9", "-o", "/"], "--output / is a directory"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_wrong_command_line_is_one_sentence_and_exit_code_2(args: list[str], message: str) -> None:
    done = phloem(*args)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


def test_wrong_variable_is_refused() -> None:
    done = phloem("serve", "gateway", env={"PHLOEM_GATEWAY_PROT": "3"})
    assert "PHLOEM_GATEWAY_PROT. Did you mean PHLOEM_GATEWAY_PORT?" in done.stderr
    assert done.returncode == 2


def test_variable_of_another_service_is_no_mistake() -> None:
    done = phloem(
        "serve", "gateway", "--port", "99999", env={"PHLOEM_PAGE_SIZE": "16", "PHLOEM_PREFILL": "2"}
    )
    assert "--port" in done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"


def test_chat_with_nobody_there_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "--url", "http://127.0.0.1:1"]) == 1
    assert "no answer from http://127.0.0.1:1" in capsys.readouterr().err

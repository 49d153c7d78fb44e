"""`phloem up`: when it restarts, how it supervises, what it shows."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from rich.console import Console

from phloem.cli.up.child_log import ChildLog, Stage, stage_in
from phloem.cli.up.command import UpRun
from phloem.cli.up.config import UpConfig
from phloem.cli.up.display import LineDisplay
from phloem.cli.up.model import prepare_model
from phloem.cli.up.plan import ChildSpec, Kind
from phloem.cli.up.ports import bound_socket, free_port, require_free_port
from phloem.cli.up.restart_policy import next_restart
from phloem.cli.up.secret import keep_secret
from phloem.cli.up.summary import curl_line
from phloem.cli.up.supervisor import Supervisor
from phloem.cli.up.valkey import plan_valkey, wait_for_redis
from phloem.shared.discovery import keys
from phloem.shared.discovery.registry import Registry
from phloem.shared.discovery.secret import cluster_secret
from phloem.shared.engine.config import EngineOptions
from phloem.shared.errors import ConfigError, PhloemError
from tests.support.valkey import ValkeyServer
from tests.support.waiting import until, until_async, wait_until_gone

DEADLINE_S = 15.0


def test_restart_delay_doubles_up_to_a_bound_and_forgets_after_a_healthy_minute() -> None:
    delays = []
    attempt = 0
    for _ in range(9):
        attempt, delay = next_restart(attempt, lived_s=1.0)
        delays.append(delay)
    assert delays[:4] == [0.5, 1.0, 2.0, 4.0]
    assert delays[-1] == 30.0
    assert next_restart(9, lived_s=61.0) == (1, 0.5)


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("... info prefill: progress stage=weights done=3 total=30 logger=x", Stage("weights", 3, 30)),
        ('progress stage="writing weights" done=0 total=0 logger=x', Stage("writing weights", 0, 0)),
        ("nothing of the kind", None),
    ],
)
def test_stages_are_read_from_log_lines(line: str, stage: Stage | None) -> None:
    assert stage_in(line) == stage


def test_child_log_gives_complete_new_lines_once(tmp_path: Path) -> None:
    log = ChildLog(tmp_path / "x.log")
    assert (log.new_lines(), log.tail(3)) == ([], [])
    log.path.write_text("one\ntw")
    assert log.new_lines() == ["one"]
    with log.path.open("a") as file:
        file.write("o\nthree\n")
    assert log.new_lines() == ["two", "three"]
    assert log.tail(2) == ["two", "three"]


def test_end_of_a_log_has_the_last_line_of_progress_only(tmp_path: Path) -> None:
    log = ChildLog(tmp_path / "x.log")
    progress = [f"progress stage=weights done={done} total=100" for done in range(40)]
    log.path.write_text("\n".join(["begins", *progress, "out of memory", "gone"]))
    assert log.tail(4) == ["begins", progress[-1], "out of memory", "gone"]
    log.path.write_text("\n".join(["begins", *progress]))
    assert log.tail(4) == ["begins", progress[-1]]


def test_port_in_use_names_the_flag() -> None:
    with bound_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} on 127.0.0.1 is in use.*--port"):
            require_free_port("127.0.0.1", port, "--port")
    require_free_port("127.0.0.1", free_port("127.0.0.1"), "--port")


async def test_up_with_a_port_in_use_starts_nothing(tmp_path: Path) -> None:
    with bound_socket("127.0.0.1", 0) as taken:
        config = UpConfig(port=taken.getsockname()[1], run_dir=str(tmp_path / "run"))
        with pytest.raises(ConfigError, match="is in use"):
            await UpRun(config, None, Console(file=io.StringIO())).run()
    assert not (tmp_path / "run").exists()


async def test_up_with_a_model_that_is_none_stops_what_it_started(tmp_path: Path) -> None:
    options = EngineOptions(model_path=str(tmp_path))
    config = UpConfig(port=free_port("127.0.0.1"), engine=options, run_dir=str(tmp_path / "run"))
    with pytest.raises(PhloemError, match="is not a model"):
        await UpRun(config, None, Console(file=io.StringIO())).run()
    assert [child.name() for child in psutil.Process().children()] == []


async def test_model_is_prepared_by_a_child_that_says_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    stages: list[Stage] = []
    path = await prepare_model(str(tmp_path), need_weights=False, on_stage=stages.append)
    assert path == tmp_path
    with pytest.raises(PhloemError, match="no safetensors"):
        await prepare_model(str(tmp_path), need_weights=True, on_stage=stages.append)


def test_curl_line_survives_a_shell() -> None:
    line = curl_line("http://127.0.0.1:30000", "it's", needs_key=True)
    assert line.startswith('curl http://127.0.0.1:30000/v1/chat/completions -H "Authorization')
    counted = subprocess.run(["sh", "-c", f"set -- {line}; echo $#"], capture_output=True, text=True)
    assert counted.stdout.strip() == "8"
    assert '"temperature": 0' in line, "at 1 the demo model rambles"


def test_lines_are_shown_once_per_stage() -> None:
    out = io.StringIO()
    with LineDisplay(Console(file=out, width=200)) as display:
        for done in range(3):
            display.stage("prefill-0", Stage("weights", done, 3))
        display.ready("prefill-0")
    assert [line.partition("] ")[2] for line in out.getvalue().splitlines()] == [
        "prefill-0: weights",
        "prefill-0: ready",
    ]


def python_child(name: str, program: str, kind: Kind = "prefill") -> ChildSpec:
    return ChildSpec(kind, name, (sys.executable, "-u", "-c", program), dict(os.environ))


SLEEP = "import time; time.sleep(600)"


async def test_death_before_the_cluster_is_up_is_fatal_and_shows_the_log(tmp_path: Path) -> None:
    async with Supervisor(tmp_path, print, 5.0) as supervisor:
        await supervisor.start(python_child("a", "print('no such model'); raise SystemExit(2)"))
        with pytest.raises(PhloemError, match=r"a exited with code 2(?s:.*)no such model"):
            await asyncio.wait_for(supervisor.failure(), DEADLINE_S)


async def test_what_a_child_said_was_wrong_is_told_in_one_sentence(tmp_path: Path) -> None:
    program = "import sys; print('line of a log'); sys.exit('phloem: error: the weights need 9 GB')"
    async with Supervisor(tmp_path, print, 5.0) as supervisor:
        await supervisor.start(python_child("a", program))
        with pytest.raises(PhloemError) as caught:
            await asyncio.wait_for(supervisor.failure(), DEADLINE_S)
    assert str(caught.value) == f"a: the weights need 9 GB (its log: {tmp_path / 'a.log'})"


async def test_child_whose_flags_were_refused_is_not_started_again(tmp_path: Path) -> None:
    lines: list[str] = []
    program = "import sys; print('phloem: error: --page-size 3'); sys.exit(2)"
    async with Supervisor(tmp_path, lines.append, 5.0) as supervisor:
        supervisor.settle()
        child = await supervisor.start(python_child("a", program))
        await until(lambda: len(lines) == 2, DEADLINE_S)
        assert child.process is not None and await child.process.wait() == 2
        assert child.num_restarts == 0
    assert lines == [f"a: --page-size 3 (its log: {child.log.path})", "a is not started again"]


async def test_death_later_is_reported_and_repaired(tmp_path: Path) -> None:
    lines: list[str] = []
    async with Supervisor(tmp_path, lines.append, 5.0) as supervisor:
        child = await supervisor.start(python_child("a", f"print('hello'); {SLEEP}"))
        supervisor.settle()
        await until(lambda: child.log.tail(1) == ["hello"], DEADLINE_S)
        first = child.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: child.num_restarts == 1, DEADLINE_S)
        assert child.pid not in (None, first)
    assert "a was killed by SIGKILL" in lines[0]
    assert "hello" in lines[0]
    assert child.process is not None and child.process.returncode is not None


async def test_children_stop_gateways_first_and_valkey_last(tmp_path: Path) -> None:
    record = tmp_path / "order"
    program = """
import signal, sys, time
def stop(*_):
    with open(sys.argv[1], "a") as f: f.write(sys.argv[2] + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("up")
time.sleep(600)
"""
    kinds: list[Kind] = ["valkey", "cache-index", "decode", "gateway"]
    async with Supervisor(tmp_path, print, 10.0) as supervisor:
        for kind in kinds:
            argv = (sys.executable, "-u", "-c", program, str(record), kind)
            child = await supervisor.start(ChildSpec(kind, kind, argv, dict(os.environ)))
            await until(lambda child=child: child.log.tail(1) == ["up"], DEADLINE_S)  # type: ignore[misc]
    assert record.read_text().split() == ["gateway", "decode", "cache-index", "valkey"]


async def test_cancelled_stop_kills_at_once(tmp_path: Path) -> None:
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); {SLEEP}"
    supervisor = Supervisor(tmp_path, print, 600.0)
    child = await supervisor.start(python_child("a", stubborn))
    await until(lambda: child.log.tail(1) == ["up"], DEADLINE_S)
    stopping = asyncio.create_task(supervisor.stop())
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert child.process is not None
    assert await asyncio.wait_for(child.process.wait(), DEADLINE_S) == -signal.SIGKILL


async def test_valkey_listens_on_loopback_with_a_password_and_dies_with_its_parent(tmp_path: Path) -> None:
    valkey = plan_valkey(tmp_path, "127.0.0.1", free_port("127.0.0.1"))
    assert (tmp_path / "valkey.conf").stat().st_mode & 0o077 == 0
    async with Supervisor(tmp_path, print, 5.0) as supervisor:
        child = await supervisor.start(valkey.spec)
        await asyncio.wait_for(wait_for_redis(valkey.url), DEADLINE_S)
        assert child.pid is not None
        process = psutil.Process(child.pid)
        listening = {c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}
        stranger = redis.asyncio.Redis(
            host="127.0.0.1", port=valkey.spec.port or 0, retry=Retry(NoBackoff(), 0)
        )
        with pytest.raises(redis.exceptions.AuthenticationError):
            await stranger.ping()
        await stranger.aclose()
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


async def test_secret_is_there_for_services_that_join_also_after_redis_lost_its_data(
    registry: Registry, valkey: ValkeyServer
) -> None:
    keeping = asyncio.create_task(keep_secret(valkey.url, b"agreed"))
    try:
        for _ in range(2):
            await until_async(lambda: _is_kept(registry))
            assert await cluster_secret(registry) == b"agreed"
            await registry.link.command("FLUSHALL")
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


async def _is_kept(registry: Registry) -> bool:
    return bool(await registry.link.command("EXISTS", keys.CLUSTER_SECRET))


def test_killed_supervisor_leaves_no_child(tmp_path: Path) -> None:
    program = f"""
import asyncio, os, sys
from pathlib import Path
from phloem.cli.up.model import prepare_model
from phloem.cli.up.plan import ChildSpec
from phloem.cli.up.supervisor import Supervisor

async def main():
    async with Supervisor(Path({str(tmp_path)!r}), print, 5.0) as supervisor:
        argv = (sys.executable, "-c", {SLEEP!r})
        child = await supervisor.start(ChildSpec("decode", "a", argv, dict(os.environ)))
        print(child.pid, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate(timeout=DEADLINE_S)
    wait_until_gone(pid)

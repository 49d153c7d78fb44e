"""`phloem up`: a child that runs but lives no more is killed and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from phloem.cli.up.hang_watch import kill_what_hangs
from phloem.cli.up.liveness import Liveness
from phloem.cli.up.plan import ChildSpec
from phloem.cli.up.supervisor import Child, Supervisor
from phloem.shared.discovery.registry import Registry
from tests.support.valkey import ValkeyServer
from tests.support.waiting import until, until_async

HANG_S = 30.0
DEADLINE_S = 20.0

# -- the decision --------------------------------------------------------------------------------------


class Watched:
    """One child "w", looked at twice a second."""

    def __init__(self) -> None:
        self.liveness = Liveness(HANG_S)
        self.now_s = 1000.0

    def look(self, for_s: float, *, pid: int | None = 1, registered: bool) -> int:
        """How often it is to be killed meanwhile."""
        kills = 0
        for _ in range(int(2 * for_s)):
            self.now_s += 0.5
            kills += len(self.liveness.hung({"w": pid}, {"w"} if registered else set(), self.now_s))
        return kills


def test_who_was_registered_and_is_not_for_the_time_out_hangs_once() -> None:
    watched = Watched()
    assert watched.look(10, registered=True) == 0
    assert watched.look(HANG_S, registered=False) == 0
    assert watched.look(1, registered=False) == 1
    assert watched.look(10 * HANG_S, registered=False) == 0, (
        "it was killed; its successor has yet to register"
    )
    assert watched.look(10 * HANG_S, pid=2, registered=False) == 0, "it loads a model"
    assert watched.look(1, pid=2, registered=True) == 0
    assert watched.look(HANG_S + 1, pid=2, registered=False) == 1


@pytest.mark.parametrize("between", ["registered", "dead", "another process", "no redis", "nobody looked"])
def test_what_happens_in_between_starts_the_time_anew(between: str) -> None:
    watched = Watched()
    watched.look(10, registered=True)
    assert watched.look(HANG_S - 1, registered=False) == 0
    if between == "registered":
        watched.look(1, registered=True)
    elif between == "dead":
        watched.look(1, pid=None, registered=False)
    elif between == "another process":
        watched.look(10, pid=2, registered=True)
    elif between == "no redis":
        watched.liveness.look_away()
    else:
        watched.now_s += 3600
    pid = 2 if between == "another process" else 1
    assert watched.look(HANG_S, pid=pid, registered=False) == 0
    assert watched.look(1, pid=pid, registered=False) == 1


@pytest.mark.parametrize("dead_for_s", [0, 0.5])
def test_a_predecessors_lease_is_not_taken_for_the_new_processs(dead_for_s: float) -> None:
    watched = Watched()
    watched.look(10, registered=True)
    watched.look(dead_for_s, pid=None, registered=True)
    assert watched.look(6, pid=2, registered=True) == 0, "what is left of the lease of who died"
    assert watched.look(10 * HANG_S, pid=2, registered=False) == 0, "it loads a model"
    assert watched.look(1, pid=2, registered=True) == 0
    assert watched.look(HANG_S + 1, pid=2, registered=False) == 1


# -- with processes ------------------------------------------------------------------------------------

SERVICE = """
import asyncio, sys
from phloem.shared.discovery.lease import LeaseKeeper, WorkerLease
from phloem.shared.discovery.registry import Registry
from tests.support.worker_records import new_record

async def main():
    registry = Registry(sys.argv[1], lease_ttl_s=0.6)
    record = new_record(sys.argv[3], epoch=await registry.next_epoch())
    keeper = LeaseKeeper(WorkerLease(registry, lambda: record), heartbeat_s=0.1)
    await keeper.acquire()
    await keeper.run()

asyncio.run(main())
"""


def service(name: str, redis_url: str) -> ChildSpec:
    argv = (sys.executable, "-c", SERVICE, redis_url, "--worker-id", name)
    return ChildSpec("prefill", name, argv, dict(os.environ))


def stop(child: Child) -> int:
    """Its process id."""
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    return child.pid


async def test_stopped_process_is_killed_and_started_again_and_others_are_not(
    tmp_path: Path, valkey: ValkeyServer, registry: Registry
) -> None:
    lines: list[str] = []
    specs = [service(name, valkey.url) for name in ("a", "b")]
    async with Supervisor(tmp_path, lines.append, 5.0) as supervisor:
        stopped, other = [await supervisor.start(spec) for spec in specs]
        supervisor.settle()
        await until_async(lambda: _registered(registry, {"a", "b"}), DEADLINE_S)
        watching = asyncio.create_task(kill_what_hangs(supervisor, specs, registry, 0.5))
        try:
            first, others = stop(stopped), other.pid
            await until(lambda: stopped.num_restarts == 1, DEADLINE_S)
            await until_async(lambda: _registered(registry, {"a", "b"}), DEADLINE_S)
            assert stopped.pid not in (None, first) and other.pid == others
            assert not watching.done()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
    assert lines[0] == "a runs, but has not been in the registry for 0.5 s: it is killed"
    assert lines[1].startswith("a was killed by SIGKILL")


async def test_nobody_is_killed_while_redis_is_away(
    tmp_path: Path, valkey: ValkeyServer, registry: Registry
) -> None:
    spec = service("a", valkey.url)
    async with Supervisor(tmp_path, print, 5.0) as supervisor:
        child = await supervisor.start(spec)
        supervisor.settle()
        await until_async(lambda: _registered(registry, {"a"}), DEADLINE_S)
        watching = asyncio.create_task(kill_what_hangs(supervisor, [spec], registry, 0.5))
        try:
            pid = child.pid
            valkey.stop()
            await asyncio.sleep(2.0)  # several time-outs long: it is absence that is tested
            valkey.start()
            await until_async(lambda: _registered(registry, {"a"}), DEADLINE_S)
            assert child.pid == pid and child.num_restarts == 0
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


async def _registered(registry: Registry, names: set[str]) -> bool:
    return {worker.worker_id for worker in (await registry.read()).workers.values()} == names

"""Kills children that hang: the supervisor starts them again, as it does with those that die."""

from __future__ import annotations

import time
from contextlib import aclosing

from phloem.cli.up.liveness import Liveness
from phloem.cli.up.plan import ChildSpec
from phloem.cli.up.readiness import is_registered
from phloem.cli.up.supervisor import Supervisor
from phloem.shared.discovery.registry import Registry


async def kill_what_hangs(
    supervisor: Supervisor, specs: list[ChildSpec], registry: Registry, hang_timeout_s: float
) -> None:
    """Never ends. `specs`: of services, which all register. Does nothing while Redis can't be reached."""
    liveness = Liveness(hang_timeout_s)
    async with aclosing(registry.watch()) as snapshots:
        async for snapshot in snapshots:
            if not snapshot.redis_ok:
                liveness.look_away()
                continue
            pids = {spec.name: supervisor.children[spec.name].pid for spec in specs}
            registered = {spec.name for spec in specs if is_registered(spec, snapshot)}
            for name in liveness.hung(pids, registered, time.monotonic()):
                supervisor.kill(name, f"runs, but has not been in the registry for {hang_timeout_s:g} s")

"""The registry of live processes: leases in Redis, each guarded by an epoch."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from phloem.shared.discovery import keys, scripts
from phloem.shared.discovery.redis_link import RedisLink
from phloem.shared.discovery.snapshot import ClusterSnapshot, Reading, merge
from phloem.shared.discovery.waker import EventWaker
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.cluster import ServiceRecord, WorkerRecord, service_record, worker_record

log = logging.getLogger(__name__)

LEASE_TTL_S = 3.0
POLL_INTERVAL_S = 0.5
FENCE_TTL_S = 3600.0
_ID_FLAGS = {"gateway": "--gateway-id", "cache_index": "--service-id"}


class Renewal(msgspec.Struct, frozen=True):
    """`held`: the lease was ours and live before this renewal. `run_id` names the run of the server."""

    held: bool
    run_id: str


class Registry:
    """Registers processes and watches the others.

    All methods raise `PhloemError` `redis_unavailable` (retryable) when Redis does not answer in time;
    `watch` never does.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        timeout_s: float = 1.0,
        lease_ttl_s: float = LEASE_TTL_S,
        poll_interval_s: float = POLL_INTERVAL_S,
    ) -> None:
        self.link = RedisLink(redis_url, timeout_s=timeout_s)
        self.lease_ttl_s = lease_ttl_s
        self._poll_interval_s = poll_interval_s

    async def connect(self, wait_s: float = 30.0, on_wait: Callable[[float], None] | None = None) -> None:
        """Waits for Redis, with a log line (or `on_wait(elapsed seconds)`) each second.

        Raises `PhloemError` `redis_unreachable` after `wait_s`, `redis_refused` when it refuses the password.
        """
        await self.link.wait_until_up(wait_s, on_wait)

    async def close(self) -> None:
        await self.link.close()

    async def next_epoch(self) -> int:
        """An epoch above all that were given out before, even when Redis has lost its data since."""
        names = (keys.EPOCH_COUNTER,)
        return int(await self.link.script(scripts.NEXT_EPOCH, names, ()))

    async def renew_worker(self, record: WorkerRecord, *, notify: bool = False) -> Renewal:
        """Registers the worker or renews its lease with this record; `notify` tells watchers at once, which
        joining does anyway. Raises `PhloemError` `stale_epoch` when a newer epoch has held the lease, or
        this one was deregistered."""
        member = keys.worker_member(record.worker_id)
        return await self._renew(member, record.epoch, worker_record.encode(record), notify, "--worker-id")

    async def renew_service(self, record: ServiceRecord, *, notify: bool = False) -> Renewal:
        """As `renew_worker`, for a gateway or an index replica."""
        member = keys.service_member(record.kind, record.service_id)
        flag = _ID_FLAGS[record.kind]
        return await self._renew(member, record.epoch, service_record.encode(record), notify, flag)

    async def deregister_worker(self, worker_id: str, epoch: int) -> bool:
        """Gives the lease back for good: this epoch can't register again. False when a newer one holds it."""
        return await self._release(keys.worker_member(worker_id), epoch)

    async def deregister_service(self, kind: str, service_id: str, epoch: int) -> bool:
        return await self._release(keys.service_member(kind, service_id), epoch)

    async def read(self, known: Reading | None = None) -> Reading:
        """The members whose leases are live now; for lost members of `known` also their fences."""
        members, _, instance, info = await self.link.pipeline(
            (
                ("ZRANGE", keys.MEMBERS, 0, -1),
                ("SET", keys.INSTANCE, secrets.token_hex(8), "NX"),
                ("GET", keys.INSTANCE),
                ("INFO", "server"),
            )
        )
        names = [member.decode() for member in members]
        workers: dict[str, WorkerRecord] = {}
        services: dict[str, ServiceRecord] = {}
        values = await self._get_all([keys.lease(name) for name in names])
        for name, value in zip(names, values, strict=True):
            if value is not None:
                _decode_into(name, value, workers, services)
        generation = f"{info['run_id']}/{instance.decode()}"
        fences = await self._fences(known, workers, services)
        return Reading(workers, services, fences, generation)

    async def watch(self) -> AsyncGenerator[ClusterSnapshot, None]:
        """Yields a snapshot at once, then at every change that is announced and at least every poll interval.

        Never ends and never raises for Redis: while it is down the last members are yielded with `redis_ok`
        False, and it recovers by itself.
        """
        snapshot = ClusterSnapshot()
        last: Reading | None = None
        kept: Reading | None = None
        read_at = kept_until = time.monotonic()
        waker = EventWaker(self.link, keys.EVENTS)
        try:
            while True:
                try:
                    reading = await self.read(kept or last)
                except PhloemError:
                    age_s = time.monotonic() - read_at
                    snapshot = msgspec.structs.replace(snapshot, redis_ok=False, age_s=age_s)
                else:
                    now = read_at = time.monotonic()
                    if last is not None and (not snapshot.redis_ok or reading.generation != last.generation):
                        kept = kept or last
                        kept_until = now + self.lease_ttl_s
                    elif now >= kept_until:
                        kept = None
                    snapshot = merge(snapshot, reading, kept)
                    last = reading
                yield snapshot
                await waker.wait(self._poll_interval_s)
        finally:
            await waker.close()

    async def _fences(
        self,
        known: Reading | None,
        workers: dict[str, WorkerRecord],
        services: dict[str, ServiceRecord],
    ) -> dict[str, int]:
        if known is None:
            return {}
        lost = [m for m in (*known.workers, *known.services) if m not in workers and m not in services]
        values = await self._get_all([keys.fence(member) for member in lost])
        return {member: int(value) for member, value in zip(lost, values, strict=True) if value is not None}

    async def _get_all(self, names: list[str]) -> list[bytes | None]:
        values: list[bytes | None] = await self.link.command("MGET", *names) if names else []
        return values

    async def _renew(self, member: str, epoch: int, record: bytes, notify: bool, id_flag: str) -> Renewal:
        names = (keys.lease(member), keys.fence(member), keys.MEMBERS)
        reply: list[Any] = await self.link.script(
            scripts.RENEW,
            names,
            (
                member,
                epoch,
                record,
                _ms(self.lease_ttl_s),
                _ms(FENCE_TTL_S),
                keys.EVENTS,
                int(notify),
            ),
        )
        held, text = int(reply[0]), bytes(reply[1]).decode()
        if held < 0:
            raise PhloemError(
                "stale_epoch",
                f"{member} at epoch {epoch} is not allowed to register: epoch {text} came after it: "
                f"another process runs with the same {id_flag}, give each its own",
                http_status=409,
            )
        return Renewal(held == 1, text)

    async def _release(self, member: str, epoch: int) -> bool:
        names = (keys.lease(member), keys.fence(member), keys.MEMBERS)
        args = (member, epoch, _ms(FENCE_TTL_S), keys.EVENTS)
        return bool(await self.link.script(scripts.RELEASE, names, args))


def _decode_into(
    name: str, value: bytes, workers: dict[str, WorkerRecord], services: dict[str, ServiceRecord]
) -> None:
    """One unreadable record (another version's, say) must not hide the other members."""
    try:
        if name.startswith("worker:"):
            workers[name] = worker_record.decode(value)
        else:
            services[name] = service_record.decode(value)
    except PhloemError as error:
        log.warning("the record of %s is skipped: %s", name, error)


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))

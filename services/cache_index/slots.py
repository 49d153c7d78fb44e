"""Slots: small numbers leased to one (worker, epoch) each, the columns of the blocks' bitmaps.

A slot is leased -> retired -> free -> leased. It is retired when its worker died or attached anew, and free
once no block names it, so that a stale bit can never speak for a new worker.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable

import msgspec

from phloem.services.cache_index import layout
from phloem.shared.discovery import keys
from phloem.shared.discovery.redis_link import RedisLink
from phloem.shared.errors import PhloemError, overloaded
from phloem.shared.protocol.session import PeerRef


class SlotTable(msgspec.Struct, frozen=True):
    """Who held which slot at one instant; `version` names that instant's state."""

    version: bytes | None
    workers: dict[int, PeerRef]

    def mask(self, live: Iterable[PeerRef]) -> int:
        """The bits of the slots whose worker, at its epoch, is in `live`."""
        living = frozenset(live)
        return sum(1 << slot for slot, worker in self.workers.items() if worker in living)


class Slots:
    """The slot leases in Redis. Every method raises `PhloemError` `redis_unavailable` when it is away."""

    def __init__(self, link: RedisLink, max_slots: int) -> None:
        self._link = link
        self._max_slots = max_slots

    async def attach(self, worker: PeerRef) -> int:
        """Leases an empty slot; what the worker had before is retired.

        Raises `PhloemError`: `stale_epoch` when a newer epoch of the worker is known, `index_full`
        (retryable) when all slots are leased or not yet swept.
        """
        member = keys.worker_member(worker.worker_id)
        slot = int(
            await self._link.script(
                layout.ATTACH,
                (
                    layout.SLOTS,
                    layout.SEQ,
                    layout.RETIRED,
                    layout.FREE,
                    layout.HIGH,
                    layout.VERSION,
                    keys.fence(member),
                    layout.DIGESTS,
                ),
                (worker.epoch, worker.worker_id, self._max_slots, _nonce()),
            )
        )
        if slot == -1:
            raise PhloemError(
                "stale_epoch",
                f"worker {worker.worker_id} at epoch {worker.epoch} was replaced by a newer one",
                http_status=409,
            )
        if slot == -2:
            raise overloaded(
                f"all {self._max_slots} slots of the index are taken: raise --max-slots",
                code="index_full",
            )
        return slot

    async def table(self, timeout_s: float | None = None) -> SlotTable:
        """Who has which slot now. Raises `PhloemError` (`redis_unavailable`)."""
        reply = await self._link.script(
            layout.READ_SLOTS, (layout.SLOTS, layout.VERSION), (), timeout_s=timeout_s
        )
        fields = iter(reply[1:])
        workers = {
            int(slot): layout.worker_of(text.decode()) for slot, text in zip(fields, fields, strict=True)
        }
        return SlotTable(reply[0], workers)

    async def retire(self, slot: int, worker: PeerRef) -> bool:
        """Takes the slot from a worker whose lease at that epoch is gone; False when it lives or lost the
        slot already."""
        member = keys.worker_member(worker.worker_id)
        names = (
            layout.SLOTS,
            layout.SEQ,
            layout.RETIRED,
            layout.VERSION,
            keys.lease(member),
            keys.fence(member),
            layout.DIGESTS,
        )
        args = (slot, layout.owner(worker), worker.epoch, _nonce())
        return bool(await self._link.script(layout.RETIRE, names, args))

    async def retired(self) -> dict[int, bytes]:
        """Slots to be cleared, each with the stamp of its retirement."""
        reply: dict[bytes, bytes] = await self._link.command("HGETALL", layout.RETIRED)
        return {int(slot): stamp for slot, stamp in reply.items()}

    async def free(self, slot: int, stamp: bytes) -> bool:
        """Makes a cleared slot leasable; False when this retirement is over already."""
        return bool(await self._link.script(layout.FREE_SLOT, (layout.RETIRED, layout.FREE), (slot, stamp)))


def _nonce() -> str:
    return secrets.token_hex(8)

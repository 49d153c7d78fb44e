"""Claims on the accelerators of a host, so that replicas never share one by accident."""

from __future__ import annotations

from collections.abc import Sequence

from phloem.shared.discovery import keys, scripts
from phloem.shared.discovery.registry import Registry, Renewal
from phloem.shared.errors import PhloemError, unavailable

# Longer than a worker's lease: a stall that costs the worker its lease must not cost it its GPU.
DEVICE_TTL_S = 10.0


class DeviceClaim:
    """One claimed device; a `Lease`, so that a `LeaseKeeper` holds it from before the engine loads."""

    def __init__(self, registry: Registry, host_id: str, index: int, owner: str, epoch: int) -> None:
        self.index = index
        self.ttl_s = DEVICE_TTL_S
        self._registry = registry
        self._key = keys.device(host_id, index)
        self._owner = owner
        self._epoch = epoch

    async def renew(self) -> Renewal:
        """Raises `PhloemError` `device_taken` when a process that started earlier holds the device."""
        args = (self._epoch, self._owner, _TTL_MS)
        held = int(await self._registry.link.script(scripts.RENEW_DEVICE, (self._key,), args))
        if held < 0:
            raise PhloemError(
                "device_taken",
                f"device {self.index} of this host belongs to another worker that started earlier",
                http_status=409,
            )
        return Renewal(held == 1, "")

    async def release(self) -> None:
        args = (self._epoch, self._owner)
        await self._registry.link.script(scripts.RELEASE_DEVICE, (self._key,), args)


async def claim_device(
    registry: Registry, host_id: str, candidates: Sequence[int], owner: str, epoch: int
) -> DeviceClaim:
    """Claims the first free device among `candidates` (indices on the host); asking again returns the same.

    Raises `PhloemError` `no_free_device` (retryable) when others hold them all.
    """
    names = [keys.device(host_id, index) for index in candidates]
    position = 0
    if names:
        reply = await registry.link.script(scripts.CLAIM_DEVICE, names, (epoch, owner, _TTL_MS))
        position = int(reply[0])
    if position == 0:
        raise unavailable(
            f"no free device on this host among {list(candidates)}: other workers hold them, and workers "
            "that hand KV over can't share one. With one GPU run a `unified` worker, or use --device cpu",
            code="no_free_device",
        )
    return DeviceClaim(registry, host_id, candidates[position - 1], owner, epoch)


_TTL_MS = round(DEVICE_TTL_S * 1000)

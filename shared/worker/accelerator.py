"""One GPU per worker: claimed in Redis, so that workers of one host never share one by accident.

`--device cuda` waits for a free GPU, `auto` takes one if there is one; both hide the others from the engine.
`cpu` and `cuda:N` are taken as said, without a claim: who names a GPU may share it on purpose.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from phloem.shared.discovery.devices import DEVICE_TTL_S, DeviceClaim, claim_device
from phloem.shared.discovery.lease import LeaseKeeper
from phloem.shared.discovery.registry import Registry
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import PeerRef

log = logging.getLogger(__name__)

# A worker that was killed keeps its claim for this long; the one that replaces it waits it out.
CLAIM_WAIT_S = DEVICE_TTL_S + 5.0
CLAIM_RETRY_S = 0.5

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_GPU_NODE = re.compile(r"nvidia(\d+)")


class HostGpus(msgspec.Struct, frozen=True):
    """The GPUs that this process may use. `host_id` is the same in all containers of a host; `minors` number
    the GPUs of the whole host; `visible` is how each is named in CUDA_VISIBLE_DEVICES."""

    host_id: str
    minors: tuple[int, ...] = ()
    visible: tuple[str, ...] = ()


def host_gpus(environ: Mapping[str, str], dev: Path = Path("/dev")) -> HostGpus:
    """What is in `dev`, less what CUDA_VISIBLE_DEVICES hides. No GPU where torch was built without CUDA, and
    none where the operator named devices by UUID: they are pinned already."""
    matches = [_GPU_NODE.fullmatch(node.name) for node in dev.iterdir()]
    minors = sorted(int(match[1]) for match in matches if match is not None)
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(n) for n in range(len(minors))] if chosen is None else [n.strip() for n in chosen.split(",")]
    if not minors or _torch_lacks_cuda() or not all(n.isdigit() and int(n) < len(minors) for n in names):
        return HostGpus(_BOOT_ID.read_text().strip())
    return HostGpus(_BOOT_ID.read_text().strip(), tuple(minors[int(n)] for n in names), tuple(names))


@asynccontextmanager
async def claimed_gpu(
    registry: Registry, gpus: HostGpus, device: str, me: PeerRef, *, wait_s: float = CLAIM_WAIT_S
) -> AsyncIterator[dict[str, str]]:
    """Holds a GPU inside the block; gives what must be in the engine's environment (nothing: no claim).

    Raises `PhloemError`: `no_free_device` for `cuda` when others hold all GPUs for `wait_s`, `device_taken`
    when an older worker turns out to hold this one.
    """
    if device not in ("auto", "cuda") or not gpus.minors:
        yield {}
        return
    claim = await _claim(registry, gpus, device, me, wait_s)
    if claim is None:
        yield {"CUDA_VISIBLE_DEVICES": ""}
        return
    name = gpus.visible[gpus.minors.index(claim.index)]
    log.info("GPU claimed", extra={"gpu": claim.index, "worker": me.worker_id})
    async with asyncio.TaskGroup() as tasks:
        keeper = LeaseKeeper(claim)
        await keeper.acquire()
        renewing = tasks.create_task(keeper.run(), name="GPU claim")
        try:
            yield {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": name}
        finally:
            renewing.cancel()
            await keeper.close()


async def _claim(
    registry: Registry, gpus: HostGpus, device: str, me: PeerRef, wait_s: float
) -> DeviceClaim | None:
    """None: `auto`, and no GPU is free."""
    give_up_at = time.monotonic() + wait_s
    while True:
        try:
            return await claim_device(registry, gpus.host_id, gpus.minors, me.worker_id, me.epoch)
        except PhloemError as error:
            if error.code != "no_free_device":
                raise
            if device == "auto":
                log.warning("other workers hold all GPUs of this host: running on the CPU")
                return None
            if time.monotonic() >= give_up_at:
                raise
        await asyncio.sleep(CLAIM_RETRY_S)


def _torch_lacks_cuda() -> bool:
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return True

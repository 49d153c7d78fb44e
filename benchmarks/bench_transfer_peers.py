"""Memory of KV channels as peers join and leave: what a channel takes beside the pool, and what comes back.

    python benchmarks/bench_transfer_peers.py [--device cpu] [--peers 8] [--joins 30] [--check]

One process has a decode endpoint (GPU 1) with the product's staging, another one has the prefill endpoints
(GPU 0) of as many workers. Each opens its channel and sends one piece of the size of its slot; then all but
the first leave, and others join and leave one by one. Memory is that of the decode side's device, or process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue

import torch

from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Piece
from phloem.shared.transfer.config import STAGING_BYTES, TransferConfig
from phloem.shared.transfer.endpoint import TransferEndpoint
from phloem.shared.transfer.events import PieceReceived, TransferEvent
from phloem.shared.transfer.pending import MovedNow
from phloem.shared.transfer_bench.memory import resident_mib

MIB = 2**20
HOST = "127.0.0.1"
TIMEOUT_S = 30.0
SETTLE_S = 2.0  # before memory is read that others gave back
MAX_GROWTH_MIB = 64.0
DECODE = PeerRef("decode", 1)


def endpoint_of(
    me: PeerRef, device: str, deliver: Callable[[TransferEvent], None], max_peers: int, slot_bytes: int
) -> TransferEndpoint:
    config = TransferConfig(
        me=me,
        host=HOST,
        cluster_secret=b"peers come and go",
        kv_layout="bench",
        device=device,
        staging_bytes=slot_bytes,
        max_peers=max_peers,
        accepts=me == DECODE,
    )
    return TransferEndpoint(config, deliver)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"not in {TIMEOUT_S:.0f} s: {what}"
        time.sleep(0.005)


class PrefillSide:
    """Runs in a process of its own; told "join NAME" or "leave NAME", it answers when that is done."""

    def __init__(self, device: str, address: str, slot_bytes: int) -> None:
        self._device = device
        self._address = address
        self._slot_bytes = slot_bytes
        self._endpoints: dict[str, TransferEndpoint] = {}

    def join(self, name: str) -> None:
        endpoint = endpoint_of(PeerRef(name, 1), self._device, lambda event: None, 1, self._slot_bytes)
        self._endpoints[name] = endpoint
        endpoint.peer_up(DECODE, self._address)
        wait_until(lambda: endpoint.is_open(DECODE, "prefill"), "the channel is open")
        slot = endpoint.acquire_slot(DECODE)
        assert slot is not None
        slot.tensor.fill_(7)
        if self._device != "cpu":
            torch.cuda.synchronize(self._device)
        num_bytes = slot.tensor.numel()
        endpoint.send_piece(DECODE, Piece("bench", 1, 0, 1, 0, 1, num_bytes), slot, MovedNow(0))

    def leave(self, name: str) -> None:
        self._endpoints.pop(name).close()

    def close(self) -> None:
        for name in list(self._endpoints):
            self.leave(name)


def run_prefill(pipe: Connection, device: str, address: str, slot_bytes: int) -> None:
    side = PrefillSide(device, address, slot_bytes)
    while (order := pipe.recv()) is not None:
        word, name = order
        (side.join if word == "join" else side.leave)(name)
        pipe.send("done")
    side.close()


class Bench:
    """The decode side, and what it sees."""

    def __init__(self, device: str, num_peers: int) -> None:
        self._device = "cpu" if device == "cpu" else "cuda:0"
        # A CPU's memory counts when it is touched, and a slot of 128 MiB takes it a while.
        self._slot_bytes = STAGING_BYTES if device != "cpu" else 16 * MIB
        self._num_peers = num_peers
        self._events: SimpleQueue[TransferEvent] = SimpleQueue()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        os.environ["CUDA_VISIBLE_DEVICES"] = "1"
        if device != "cpu":
            torch.zeros(1, device=self._device)  # CUDA's own memory is not the pool's
        self._before_mib = self._used_mib()
        self._endpoint = endpoint_of(DECODE, self._device, self._events.put, num_peers, self._slot_bytes)
        self._with_pool_mib = self._used_mib()
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
        arguments = (theirs, self._device, self._endpoint.address, self._slot_bytes)
        self._child = context.Process(target=run_prefill, args=arguments, daemon=True)
        self._child.start()

    def run(self, num_joins: int) -> float:
        """Prints the table; returns by how many MiB the joins and leaves made the memory grow."""
        pool_mib = self._with_pool_mib - self._before_mib
        block_mib = self._slot_bytes / MIB
        print(f"a pool for {self._num_peers} peers, blocks of {block_mib:g} MiB: {pool_mib:.0f} MiB")
        print("channels   beside the pool, MiB   by this channel   lent by the pool, MiB   slot, MiB")
        last_mib = self._with_pool_mib
        for n in range(self._num_peers):
            slot_mib = self._join(f"first-{n}")
            used_mib = self._used_mib()
            print(
                f"{n + 1:8} {used_mib - self._with_pool_mib:22.1f} {used_mib - last_mib:17.1f} "
                f"{self._lent_mib():23.0f} {slot_mib:11g}"
            )
            last_mib = used_mib
        for n in range(1, self._num_peers):
            self._leave(f"first-{n}")
        base_mib = self._settled_mib()
        print(
            f"all but the first left: {base_mib - self._with_pool_mib:.1f} MiB, {self._lent_mib():.0f} lent"
        )
        seconds = [self._come_and_go(f"later-{n}") for n in range(num_joins)]
        growth_mib = self._settled_mib() - base_mib
        print(
            f"{num_joins} came and went: {growth_mib:+.1f} MiB, {self._lent_mib():.0f} lent; "
            f"a join with its first piece: {statistics.median(seconds):.2f} s (median)"
        )
        return growth_mib

    def close(self) -> None:
        self._pipe.send(None)
        self._endpoint.close(0.0)
        self._child.join(TIMEOUT_S)

    def _come_and_go(self, name: str) -> float:
        began = time.perf_counter()
        self._join(name)
        seconds = time.perf_counter() - began
        self._leave(name)
        return seconds

    def _join(self, name: str) -> float:
        """MiB of the slot in which the first piece came."""
        self._order("join", name)
        while not isinstance(event := self._events.get(timeout=TIMEOUT_S), PieceReceived):
            pass
        if event.incoming is not None:
            event.incoming.wait(TIMEOUT_S)
        self._endpoint.release(event)
        return event.slot.tensor.numel() / MIB

    def _leave(self, name: str) -> None:
        count = self._endpoint.status().num_channels
        self._order("leave", name)
        wait_until(lambda: self._endpoint.status().num_channels < count, f"{name} has left")

    def _order(self, word: str, name: str) -> None:
        self._pipe.send((word, name))
        assert self._pipe.poll(TIMEOUT_S), "the prefill side is silent"
        self._pipe.recv()

    def _settled_mib(self) -> float:
        time.sleep(SETTLE_S)
        return self._used_mib()

    def _used_mib(self) -> float:
        if self._device == "cpu":
            return resident_mib(os.getpid())
        free, total = torch.cuda.mem_get_info(self._device)
        return (total - free) / MIB

    def _lent_mib(self) -> float:
        return self._endpoint.status().staging_lent_bytes / MIB


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--peers", type=int, default=8)
    parser.add_argument("--joins", type=int, default=30)
    parser.add_argument("--check", action="store_true", help=f"fail above {MAX_GROWTH_MIB:.0f} MiB of growth")
    options = parser.parse_args()
    bench = Bench(options.device, options.peers)
    try:
        growth_mib = bench.run(options.joins)
    finally:
        bench.close()
    return int(options.check and growth_mib > MAX_GROWTH_MIB)


if __name__ == "__main__":
    sys.exit(main())

"""KV transfer on the CPU: bandwidth of `send_piece` against raw Gloo sends of the same bytes, in one run.

    python benchmarks/bench_transfer_cpu.py [--piece-mib 16] [--pieces 32] [--rounds 7]

Two processes on one machine, over loopback. "raw" posts one send at a time on a plane of its own and waits
for it; "raw, posted ahead" keeps as many under way as a channel has slots. "send_piece" goes through two
endpoints with headers, credits and releases; nobody gathers, scatters or digests. Medians over the rounds,
which alternate.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue

import torch

from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Piece
from phloem.shared.transfer.config import TransferConfig
from phloem.shared.transfer.endpoint import TransferEndpoint
from phloem.shared.transfer.events import ChannelOpened, PieceReceived, Side, TransferEvent
from phloem.shared.transfer.frames import FrameSocket
from phloem.shared.transfer.pending import MovedNow, Pending
from phloem.shared.transfer.planes import DataPlane, PlaneSpec, open_plane
from phloem.shared.transfer.rendezvous import ControlStore

HOST = "127.0.0.1"
TIMEOUT_S = 30.0
NUM_SLOTS = 4
PREFILL, DECODE = PeerRef("bench-prefill", 1), PeerRef("bench-decode", 1)


def config(me: PeerRef, piece_bytes: int) -> TransferConfig:
    return TransferConfig(
        me=me,
        host=HOST,
        cluster_secret=b"bench",
        kv_layout="bench",
        staging_bytes=piece_bytes,
        staging_slots=NUM_SLOTS,
        timeout_s=TIMEOUT_S,
        accepts=me == DECODE,
    )


def raw_plane(sock: socket.socket, side: Side) -> DataPlane:
    frames = FrameSocket(sock)
    frames.set_timeout(TIMEOUT_S)
    return open_plane(PlaneSpec(HOST, side, "cpu", TIMEOUT_S), ControlStore(frames, TIMEOUT_S))


def run_decode(pipe: Connection, piece_bytes: int, num_pieces: int, rounds: int) -> None:
    """Per round: receives raw pieces one by one, then posted ahead, then releases those of the endpoint."""
    events: SimpleQueue[TransferEvent] = SimpleQueue()
    endpoint = TransferEndpoint(config(DECODE, piece_bytes), events.put)
    with socket.create_server((HOST, 0)) as server:
        pipe.send((endpoint.address, server.getsockname()[1]))
        sock, _ = server.accept()
    plane = raw_plane(sock, "decode")
    slots = [torch.zeros(piece_bytes, dtype=torch.uint8) for _ in range(NUM_SLOTS)]
    for _ in range(rounds):
        for depth in (1, NUM_SLOTS):
            pending: deque[Pending] = deque()
            for n in range(num_pieces):
                if len(pending) == depth:
                    pending.popleft().wait(TIMEOUT_S)
                pending.append(plane.post_receive(slots[n % depth], piece_bytes))
            for last in pending:
                last.wait(TIMEOUT_S)
            pipe.send("received")
        for _ in range(num_pieces):
            while not isinstance(event := events.get(), PieceReceived):
                pass
            endpoint.release(event)
        pipe.send("received")
    pipe.recv()
    endpoint.close()


def send_raw(plane: DataPlane, slots: list[torch.Tensor], depth: int, num_pieces: int) -> None:
    pending: deque[Pending] = deque()
    for n in range(num_pieces):
        if len(pending) == depth:
            pending.popleft().wait(TIMEOUT_S)
        pending.append(plane.post_send(slots[n % depth]))
    for last in pending:
        last.wait(TIMEOUT_S)


def send_pieces(
    endpoint: TransferEndpoint, events: SimpleQueue[TransferEvent], piece_bytes: int, num_pieces: int
) -> None:
    for n in range(num_pieces):
        while (slot := endpoint.acquire_slot(DECODE)) is None:
            events.get()
        endpoint.send_piece(DECODE, Piece("bench", 1, n, 1, 0, 1, piece_bytes, 0), slot, MovedNow(0))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--piece-mib", type=int, default=16)
    parser.add_argument("--pieces", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    piece_bytes = options.piece_mib * 1024 * 1024

    pipe, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    arguments = (theirs, piece_bytes, options.pieces, options.rounds)
    child = context.Process(target=run_decode, args=arguments, daemon=True)
    child.start()
    address, raw_port = pipe.recv()
    plane = raw_plane(socket.create_connection((HOST, raw_port)), "prefill")
    events: SimpleQueue[TransferEvent] = SimpleQueue()
    endpoint = TransferEndpoint(config(PREFILL, piece_bytes), events.put)
    started = time.perf_counter()
    endpoint.peer_up(DECODE, address)
    assert isinstance(events.get(timeout=TIMEOUT_S), ChannelOpened)
    print(f"opening a channel: {1e3 * (time.perf_counter() - started):.1f} ms")

    slots = [torch.zeros(piece_bytes, dtype=torch.uint8) for _ in range(NUM_SLOTS)]
    ways: dict[str, Callable[[], None]] = {
        "raw": lambda: send_raw(plane, slots, 1, options.pieces),
        "raw, posted ahead": lambda: send_raw(plane, slots, NUM_SLOTS, options.pieces),
        "send_piece": lambda: send_pieces(endpoint, events, piece_bytes, options.pieces),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, send in ways.items():
            started = time.perf_counter()
            send()
            pipe.recv()
            rates[way].append(piece_bytes * options.pieces / 1e6 / (time.perf_counter() - started))
    base = statistics.median(rates["raw"])
    print(f"{options.pieces} pieces of {options.piece_mib} MiB, median of {options.rounds} rounds:")
    for way, values in rates.items():
        median = statistics.median(values)
        print(f"  {way:<18} {median:8.0f} MB/s  {median / base:5.2f} x raw  (best {max(values):.0f})")
    pipe.send("done")
    endpoint.close()
    child.join()


if __name__ == "__main__":
    main()

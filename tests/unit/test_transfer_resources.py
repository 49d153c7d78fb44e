"""What an endpoint opens: only on loopback, and nothing is left of it."""

from __future__ import annotations

import gc
import threading

import psutil

from phloem.shared.protocol.transfer import Opened
from phloem.shared.transfer.events import ChannelLost, ChannelOpened, PieceReceived
from tests.support.transfer import (
    DECODE,
    NUM_SLOTS,
    PREFILL,
    Pair,
    Recorded,
    dial_open,
    joined,
    open_request,
    piece,
    transfer_config,
    wait_until,
)

NUM_RECONNECTS = 20
THREADS_OF_A_PAIR = 7  # the accepting one, and three a side


def listening_addresses() -> set[str]:
    connections = psutil.Process().net_connections("inet")
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def num_descriptors() -> int:
    return psutil.Process().num_fds()


def num_threads() -> int:
    """Native threads of torch included."""
    return psutil.Process().num_threads()


def transfer_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("phloem-transfer")]


def reconnect(pair: Pair) -> None:
    pair.decode.endpoint.peer_down(PREFILL)
    pair.decode.next_of(ChannelLost)
    pair.prefill.next_of(ChannelLost)
    pair.prefill.next(ChannelOpened)
    pair.decode.next(ChannelOpened)


def test_every_socket_listens_on_loopback_only() -> None:
    before = num_listening()
    with joined():
        # The control listener, and one Gloo listener a rank.
        assert num_listening() - before == 3
        assert listening_addresses() <= {"127.0.0.1", "::ffff:127.0.0.1"}


def num_listening() -> int:
    connections = psutil.Process().net_connections("inet")
    return sum(1 for c in connections if c.status == psutil.CONN_LISTEN)


def test_prefill_endpoint_without_a_channel_listens_nowhere() -> None:
    before = num_listening()
    prefill = Recorded(transfer_config(PREFILL))
    assert prefill.endpoint.address == ""
    assert num_listening() == before
    prefill.endpoint.close()


def test_nothing_is_left_after_close() -> None:
    with joined():  # lets torch start what it keeps for the life of the process
        pass
    gc.collect()  # what earlier tests left in cycles must not go during this one
    before = (num_threads(), num_descriptors())
    with joined() as pair:
        pair.send(piece("r"), fill=1)
        pair.decode.endpoint.release(pair.decode.next(PieceReceived))
        assert num_threads() > before[0]
    assert transfer_threads() == []
    del pair
    wait_until(lambda: (num_threads(), num_descriptors()) == before)


def test_no_descriptor_or_thread_leaks_over_reconnects() -> None:
    with joined() as pair:
        reconnect(pair)
        gc.collect()
        before = settled()
        for fill in range(NUM_RECONNECTS):
            for page in range(NUM_SLOTS):
                assert pair.send(piece("r", page), fill=fill)
            received = [pair.decode.next(PieceReceived) for _ in range(NUM_SLOTS)]
            assert [int(r.data[0]) for r in received] == [fill] * NUM_SLOTS
            del received
            reconnect_quickly(pair)
        assert settled() == before


def settled() -> tuple[int, int]:
    """Threads and descriptors, once the channel before is gone."""
    wait_until(lambda: len(transfer_threads()) == THREADS_OF_A_PAIR)
    return num_threads(), num_descriptors()


def reconnect_quickly(pair: Pair) -> None:
    """As when discovery loses and finds a peer: no backoff has built up."""
    pair.prefill.endpoint.peer_down(DECODE)
    pair.prefill.next_of(ChannelLost)
    pair.prefill.endpoint.peer_up(DECODE, pair.decode.endpoint.address)
    pair.prefill.next(ChannelOpened)
    pair.decode.next_of(ChannelLost)
    pair.decode.next(ChannelOpened)


def test_closing_does_not_wait_for_a_peer_that_went_away_while_opening() -> None:
    decode = Recorded(transfer_config(DECODE, accepts=True, timeout_s=60.0))
    gone, answer = dial_open(decode.endpoint.address, open_request(channel_name="gone"))
    hanging, _ = dial_open(decode.endpoint.address, open_request(channel_name="hanging"))
    assert isinstance(answer, Opened)
    gone.close()
    wait_until(lambda: len(transfer_threads()) == 3)  # the accepting one, and the hanging one's two
    decode.endpoint.close()
    assert transfer_threads() == []
    hanging.close()
    decode.assert_silent()

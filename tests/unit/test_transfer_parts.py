"""The parts of a channel, each by itself."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phloem.shared.errors import PhloemError
from phloem.shared.protocol.transfer import Credit, Rendezvous, transfer_message
from phloem.shared.transfer.frames import FrameSocket
from phloem.shared.transfer.interfaces import interface_of, nccl_binding
from phloem.shared.transfer.mailbox import Mailbox
from phloem.shared.transfer.pending import MovedNow
from phloem.shared.transfer.rendezvous import MAX_KEYS, ControlStore
from phloem.shared.transfer.staging import ReceiveRing, SendRing, StagingSlot
from phloem.shared.transfer.stats import PeerMeter
from tests.support.transfer import make_slots, wait_until


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return socket.create_connection(server.getsockname(), 5.0), server.accept()[0]


@pytest.fixture
def frame_pair() -> Iterator[tuple[FrameSocket, FrameSocket]]:
    left, right = connected()
    frames = FrameSocket(left), FrameSocket(right)
    for side in frames:
        side.set_timeout(5.0)
    yield frames
    for side in frames:
        side.close()


def code_of(error: pytest.ExceptionInfo[PhloemError]) -> str:
    return error.value.code


def test_frames_keep_their_borders(frame_pair: tuple[FrameSocket, FrameSocket]) -> None:
    left, right = frame_pair
    payloads = [b"", b"a", bytes(range(256)) * 100, b"", b"end"]
    for payload in payloads:
        left.write(payload)
    assert [right.read(1 << 20) for _ in payloads] == payloads


def test_frames_that_come_together_and_in_parts_are_read_one_by_one() -> None:
    sender, receiver = connected()
    frames = FrameSocket(receiver)
    sender.sendall(b"\0\0\0\1a\0\0\0\0\0\0\0\3b")
    assert [frames.read(8), frames.read(8)] == [b"a", b""]
    sender.sendall(b"cd")
    assert frames.read(8) == b"bcd"
    sender.close()
    frames.close()


def test_frame_longer_than_the_cap_is_not_read(frame_pair: tuple[FrameSocket, FrameSocket]) -> None:
    left, right = frame_pair
    left.write(b"12345")
    with pytest.raises(PhloemError) as caught:
        right.read(4)
    assert code_of(caught) == "transfer_protocol"


@pytest.mark.parametrize("pause_s", [0.05, 0.000_2])
def test_deadline_bounds_a_whole_frame_that_drips(
    frame_pair: tuple[FrameSocket, FrameSocket], pause_s: float
) -> None:
    left, right = frame_pair
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(pause_s):
            left._socket.sendall(b"\0")

    left._socket.sendall(b"\0\0\xff\xff")
    dripper = threading.Thread(target=drip)
    dripper.start()
    started = time.monotonic()
    with pytest.raises(PhloemError) as caught:
        right.read(1 << 16, started + 0.3)
    stop.set()
    dripper.join()
    assert code_of(caught) == "transfer_timeout"
    assert time.monotonic() - started < 1.0


def test_deadline_bounds_a_whole_frame_of_which_the_peer_takes_little_at_a_time(
    frame_pair: tuple[FrameSocket, FrameSocket],
) -> None:
    left, right = frame_pair
    stop = threading.Event()

    def sip() -> None:
        while not stop.wait(0.01):
            right._socket.recv(100_000)

    sipper = threading.Thread(target=sip)
    sipper.start()
    started = time.monotonic()
    with pytest.raises(PhloemError) as caught:
        for _ in range(1000):
            left.write(bytes(1 << 20), started + 0.3)
    stop.set()
    left.shutdown()
    sipper.join()
    assert code_of(caught) == "transfer_timeout"
    assert time.monotonic() - started < 1.0


def test_shutdown_wakes_the_reader_on_both_sides(frame_pair: tuple[FrameSocket, FrameSocket]) -> None:
    left, _ = frame_pair
    left.shutdown()
    left.shutdown()
    for side in frame_pair:
        with pytest.raises(PhloemError) as caught:
            side.read(10)
        assert code_of(caught) == "channel_lost"


def test_writer_gives_up_on_a_peer_that_reads_nothing(frame_pair: tuple[FrameSocket, FrameSocket]) -> None:
    left, _ = frame_pair
    left.set_timeout(0.1)
    with pytest.raises(PhloemError) as caught:
        for _ in range(1000):
            left.write(bytes(1 << 20))
    assert code_of(caught) == "transfer_timeout"


def test_post_does_not_wait_for_a_peer_that_reads_nothing_and_flush_sends_the_rest(
    frame_pair: tuple[FrameSocket, FrameSocket],
) -> None:
    left, right = frame_pair
    payloads = [b""]
    while left.post(payloads[-1]):
        payloads.append(bytes([len(payloads) % 256]) * 50_000)
    reader = threading.Thread(target=lambda: got.extend(right.read(1 << 20) for _ in payloads))
    got: list[bytes] = []
    reader.start()
    left.flush()
    reader.join(5.0)
    assert got == payloads
    assert left.post(b"at once")


def test_post_fails_when_too_much_is_left(frame_pair: tuple[FrameSocket, FrameSocket]) -> None:
    with pytest.raises(PhloemError) as caught:
        for _ in range(1000):
            frame_pair[0].post(bytes(1 << 18))
    assert code_of(caught) == "transfer_timeout"


def test_socket_is_closed_when_nobody_posts_any_more(
    frame_pair: tuple[FrameSocket, FrameSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another connection may get the number of a closed one before the call is made that was to have it."""
    left, _ = frame_pair
    posting, closing = threading.Event(), threading.Event()
    numbers: list[int] = []

    def send(number: int, data: bytes) -> int:
        posting.set()
        assert closing.wait(5.0)
        numbers.extend((number, left._socket.fileno()))
        return len(data)

    monkeypatch.setattr(left._calls, "send", send)
    poster = threading.Thread(target=left.post, args=(b"a",))
    poster.start()
    assert posting.wait(5.0)
    closer = threading.Thread(target=left.close)
    closer.start()
    closer.join(0.1)  # as far as it gets
    closing.set()
    for thread in (poster, closer):
        thread.join(5.0)
    assert numbers[0] == numbers[1] != -1
    monkeypatch.undo()
    with pytest.raises(PhloemError) as caught:
        left.post(b"b")
    assert code_of(caught) == "channel_lost"


def test_what_one_rank_sets_the_other_gets(frame_pair: tuple[FrameSocket, FrameSocket]) -> None:
    left, right = (ControlStore(frames, 5.0) for frames in frame_pair)
    left.set("0/0", b"left's address")
    frame_pair[0].write(b"")  # a sign of life in between
    left.set("0/1", "text")
    assert right.get("0/1") == b"text"
    assert right.get("0/0") == b"left's address"
    assert left.check(["0/0"]) and not left.check(["0/0", "1/0"])
    assert left.get("0/0") == b"left's address"


def test_rank_that_says_nothing_is_waited_for_until_the_deadline(
    frame_pair: tuple[FrameSocket, FrameSocket],
) -> None:
    started = time.monotonic()
    with pytest.raises(PhloemError) as caught:
        ControlStore(frame_pair[0], 60.0).wait(["0/0"], timedelta(seconds=0.1))
    assert code_of(caught) == "transfer_timeout"
    assert time.monotonic() - started < 2.0


def test_rank_that_leaves_ends_the_wait_at_once(frame_pair: tuple[FrameSocket, FrameSocket]) -> None:
    frame_pair[1].shutdown()
    with pytest.raises(PhloemError) as caught:
        ControlStore(frame_pair[0], 60.0).get("0/0")
    assert code_of(caught) == "channel_lost"


def test_ranks_may_not_tell_anything_else_nor_without_end(
    frame_pair: tuple[FrameSocket, FrameSocket],
) -> None:
    store = ControlStore(frame_pair[0], 5.0)
    frame_pair[1].write(transfer_message.encode(Credit(1)))
    with pytest.raises(PhloemError) as caught:
        store.get("0/0")
    assert code_of(caught) == "transfer_protocol"
    for n in range(MAX_KEYS + 1):
        frame_pair[1].write(transfer_message.encode(Rendezvous(f"k{n}", b"")))
    with pytest.raises(PhloemError) as caught:
        store.get("0/0")
    assert code_of(caught) == "transfer_protocol"


def test_sealed_store_leaves_the_connection_alone(frame_pair: tuple[FrameSocket, FrameSocket]) -> None:
    store = ControlStore(frame_pair[0], 5.0)
    store.seal()
    store.set("late", b"1")
    frame_pair[0].write(b"next")
    assert frame_pair[1].read(10) == b"next"
    with pytest.raises(PhloemError) as caught:
        store.get("0/0")
    assert code_of(caught) == "channel_lost"


def test_mailbox_is_first_in_first_out_and_bounded() -> None:
    mailbox: Mailbox[int] = Mailbox(2)
    mailbox.put(1)
    mailbox.put(2)
    with pytest.raises(PhloemError) as caught:
        mailbox.put(3)
    assert code_of(caught) == "transfer_timeout"
    assert [mailbox.get(0.0), mailbox.get(0.0), mailbox.get(0.0)] == [1, 2, None]


def test_closing_a_mailbox_wakes_getter_and_putter() -> None:
    empty: Mailbox[int] = Mailbox(1)
    full: Mailbox[int] = Mailbox(1)
    full.put(1)
    codes: list[str] = []

    def expect_lost(call: object) -> None:
        assert callable(call)
        with pytest.raises(PhloemError) as caught:
            call()
        codes.append(code_of(caught))

    threads = [
        threading.Thread(target=expect_lost, args=(empty.get,)),
        threading.Thread(target=expect_lost, args=(lambda: full.put(2, 10.0),)),
    ]
    for thread in threads:
        thread.start()
    empty.close()
    full.close()
    for thread in threads:
        thread.join(5.0)
    assert codes == ["channel_lost"] * 2
    with pytest.raises(PhloemError):
        full.get()


def test_mailbox_is_idle_only_when_the_getter_came_back() -> None:
    mailbox: Mailbox[int] = Mailbox(4)
    assert not mailbox.is_idle
    mailbox.put(1)
    assert mailbox.get() == 1
    assert not mailbox.is_idle, "the getter still works on it"
    getter = threading.Thread(target=mailbox.get)
    getter.start()
    wait_until(lambda: mailbox.is_idle)
    mailbox.put(2)
    getter.join()


@given(
    num_slots=st.integers(1, 4),
    credits=st.integers(1, 6),
    choices=st.lists(
        st.sampled_from(["acquire", "give_back", "announce", "send", "sent", "credit"]), max_size=60
    ),
)
def test_send_ring_never_has_more_out_than_slots_and_credits(
    num_slots: int, credits: int, choices: list[str]
) -> None:
    slots = make_slots(num_slots, 1)
    ring = SendRing(slots, credits)
    acquired: list[StagingSlot] = []
    announced: list[StagingSlot] = []
    sending: list[StagingSlot] = []
    uncredited = 0

    def can_acquire() -> bool:
        num_out = len(acquired) + len(announced) + len(sending)
        return num_out < num_slots and len(acquired) + uncredited < credits

    starved = False
    for choice in choices:
        relieved = False
        if choice == "acquire":
            can = can_acquire()
            slot = ring.acquire()
            assert (slot is not None) == can
            starved = starved or slot is None
            if slot is not None:
                assert slot not in acquired and slot not in announced and slot not in sending
                acquired.append(slot)
        elif choice == "give_back" and acquired:
            relieved = ring.give_back(acquired.pop())
        elif choice == "announce" and acquired:
            announced.append(acquired.pop(0))
            ring.announcing(1)
            uncredited += 1
        elif choice == "send" and announced:
            sending.append(announced.pop(0))
            ring.sending(sending[-1])
        elif choice == "sent" and sending:
            relieved = ring.sent(sending.pop(0))
        elif choice == "credit" and uncredited:
            uncredited -= 1
            relieved = ring.credit(1)
        if choice != "acquire":
            assert relieved <= (starved and can_acquire())
            starved = starved and not relieved
            assert not (starved and can_acquire()), "a starved engine is told"
        assert ring.is_idle == (not uncredited and not sending)


def test_receive_ring_takes_back_only_what_it_gave_and_fills_the_oldest_first() -> None:
    ring = ReceiveRing(make_slots(2, 1))
    (first, _), (second, _) = ring.take(), ring.take()
    with pytest.raises(PhloemError) as caught:
        ring.take()
    assert code_of(caught) == "transfer_protocol"
    emptied = MovedNow(0)
    ring.release(second, emptied)
    with pytest.raises(AssertionError):
        ring.release(second, None)
    ring.release(first, None)
    assert [ring.take(), ring.take()] == [(second, emptied), (first, None)]


def test_busy_time_counts_overlapping_transfers_once() -> None:
    meter = PeerMeter()
    meter.sent(10, 1.0, 3.0)
    meter.sent(10, 2.0, 4.0)
    meter.sent(10, 9.0, 10.0)
    meter.received(5, 0.0, 0.5)
    stats = meter.read()
    assert (stats.bytes_sent, stats.pieces_sent, stats.send_s) == (30, 3, 4.0)
    assert (stats.bytes_received, stats.receive_s) == (5, 0.5)


def test_nccl_is_bound_to_the_interface_of_the_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(PhloemError):
        interface_of("192.0.2.1")
    assert nccl_binding("localhost")["NCCL_SOCKET_IFNAME"] == "=lo"
    assert nccl_binding("::1") == {"NCCL_SOCKET_IFNAME": "=lo", "NCCL_SOCKET_FAMILY": "AF_INET6"}
    with pytest.raises(PhloemError):
        interface_of("2001:db8::1")


def test_nccl_is_bound_to_the_interface_of_this_machines_own_addresses() -> None:
    lines = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
    for digits, *_, name in lines:
        assert interface_of(str(ipaddress.IPv6Address(int(digits, 16)))) == name

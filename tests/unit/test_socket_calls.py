"""What a socket takes and gives at once."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from phloem.shared.transfer.socket_calls import SocketCalls


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_what_is_sent_is_received_and_nothing_waits(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    calls = SocketCalls()
    assert calls.receive(theirs.fileno()) is None
    assert calls.send(ours.fileno(), b"a\0b") == 3
    assert calls.receive(theirs.fileno()) == b"a\0b"
    ours.close()
    assert calls.receive(theirs.fileno()) == b""


def test_full_socket_takes_a_part_then_nothing(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    calls, data = SocketCalls(), bytes(1 << 20)
    taken = 0
    while part := calls.send(ours.fileno(), data):
        taken += part
    received = 0
    while (piece := calls.receive(theirs.fileno())) is not None:
        received += len(piece)
    assert received == taken and calls.send(ours.fileno(), b"a") == 1


def test_broken_socket_is_an_error_and_no_signal(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    calls = SocketCalls()
    theirs.close()
    with pytest.raises(OSError) as caught:
        calls.send(ours.fileno(), b"a")
    assert caught.value.errno == errno.EPIPE
    with pytest.raises(OSError) as caught:
        calls.receive(-1)
    assert caught.value.errno == errno.EBADF

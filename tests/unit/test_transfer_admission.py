"""Who gets a channel, and who is turned away."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Iterator

import msgspec
import pytest

from phloem.shared.errors import PhloemError
from phloem.shared.host_port import split_host_port
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Opened, Refused
from phloem.shared.transfer.admission import (
    MAX_CHANNELS,
    MAX_REMEMBERED_WORKERS,
    MAX_STRANGERS,
    MAX_STRANGERS_PER_HOST,
    SeenEpochs,
    Strangers,
    refusal,
)
from phloem.shared.transfer.config import NVLINK_CHUNK_BYTES
from phloem.shared.transfer.events import ChannelLost, ChannelOpened
from phloem.shared.transfer.link_terms import describe_link, link_terms
from tests.support.transfer import (
    DECODE,
    HOST,
    PREFILL,
    Recorded,
    dial_open,
    joined,
    open_request,
    rogue_prefill,
    transfer_config,
    wait_until,
)


@pytest.fixture
def decode() -> Iterator[Recorded]:
    recorded = Recorded(transfer_config(DECODE, accepts=True))
    yield recorded
    recorded.endpoint.close(0.0)


def stranger(decode: Recorded) -> socket.socket:
    return socket.create_connection(split_host_port(decode.endpoint.address), 5.0)


def is_closed_by_peer(sock: socket.socket) -> bool:
    try:
        return sock.recv(1024) == b""
    except ConnectionResetError:
        return True


def test_wrong_secret_is_refused_and_logged(decode: Recorded, caplog: pytest.LogCaptureFixture) -> None:
    prefill = Recorded(transfer_config(PREFILL, secret=b"another cluster's"))

    def said(beginning: str) -> list[str]:
        return [t for t in (r.getMessage() for r in caplog.records) if t.startswith(beginning)]

    with caplog.at_level(logging.INFO):
        prefill.endpoint.peer_up(DECODE, decode.endpoint.address)
        wait_until(lambda: said("no KV channel") and said("a transfer connection"))
    prefill.assert_silent()
    decode.assert_silent()
    assert not prefill.endpoint.is_open(DECODE, "prefill")
    assert said("no KV channel with decode-a (epoch 7), requests go elsewhere, next try in 1 s: ")
    assert said("a transfer connection from 127.0.0.1 is refused: ")
    assert not said("no transfer channel"), "the warning has it"
    for text in said(""):
        assert "another cluster secret" in text
        assert text.endswith("give all services the same --cluster-secret")
    assert prefill.endpoint.status().cut_off[DECODE.worker_id].code == "unauthenticated"
    prefill.endpoint.close()


def test_dialer_that_has_another_secret_than_it_proves_is_told_of_as_such(
    decode: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    """It would have to take our proof for that."""
    with stranger(decode) as sock:
        sock.sendall(b"\x00\x00\x00\x31phloem-transfer/1" + b"n" * 32)
        assert len(sock.recv(1024)) == 4 + 64
        sock.sendall(b"\x00\x00\x00\x20" + b"p" * 32)
        assert is_closed_by_peer(sock)
    wait_until(lambda: "has another cluster secret than this worker" in caplog.text)


@pytest.mark.parametrize("hello", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x02hi"])
def test_stranger_that_leaves_before_any_proof_is_not_taken_for_a_wrong_secret(
    decode: Recorded, hello: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with stranger(decode) as sock:
        sock.sendall(hello)
        sock.shutdown(socket.SHUT_WR)
        assert is_closed_by_peer(sock)
    wait_until(lambda: "a transfer connection from 127.0.0.1 is refused" in caplog.text)
    assert "secret" not in caplog.text


def test_listener_that_can_not_prove_itself_learns_nothing_more(decode: Recorded) -> None:
    with pytest.raises(PhloemError) as caught:
        dial_open(decode.endpoint.address, open_request(), secret=b"another cluster's")
    assert caught.value.code == "unauthenticated"


@pytest.mark.parametrize(
    "hello",
    [
        b"\x00\x00\x00\x10GET / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x11phloem-transfer/1",
    ],
)
def test_garbage_is_hung_up_on(decode: Recorded, hello: bytes) -> None:
    with stranger(decode) as sock:
        sock.sendall(hello)
        assert is_closed_by_peer(sock)
    decode.assert_silent()


def test_proof_of_the_listener_can_not_be_played_back_to_it(decode: Recorded) -> None:
    magic = b"phloem-transfer/1"
    with stranger(decode) as first, stranger(decode) as second:
        first.sendall(b"\x00\x00\x00\x31" + magic + b"n" * 32)
        challenge = first.recv(1024)[4:36]
        # Have the listener itself answer its own challenge, on another connection.
        second.sendall(b"\x00\x00\x00\x31" + magic + challenge)
        proof = second.recv(1024)[36:]
        first.sendall(b"\x00\x00\x00\x20" + proof)
        assert is_closed_by_peer(first)


def test_strangers_of_one_address_are_few_and_keep_no_other_address_out() -> None:
    strangers = Strangers()
    for _ in range(MAX_STRANGERS_PER_HOST):
        assert strangers.enter("192.0.2.1")
    assert not strangers.enter("192.0.2.1")
    others = [f"192.0.2.{n}" for n in range(2, 2 + MAX_STRANGERS - MAX_STRANGERS_PER_HOST)]
    assert all(strangers.enter(other) for other in others)
    assert not strangers.enter("192.0.2.254"), "of all addresses together, too"
    strangers.leave("192.0.2.2")
    assert not strangers.enter("192.0.2.1") and strangers.enter("192.0.2.254")
    strangers.leave("192.0.2.1")
    assert strangers.enter("192.0.2.1")


def test_strangers_that_left_leave_no_trace() -> None:
    strangers = Strangers()
    for n in range(10 * MAX_STRANGERS):
        assert strangers.enter(f"host-{n}")
        strangers.leave(f"host-{n}")
    assert not strangers._by_host


def test_stranger_that_drips_bytes_is_hung_up_on_at_the_handshakes_deadline() -> None:
    decode = Recorded(transfer_config(DECODE, accepts=True, timeout_s=0.5))
    started = time.monotonic()
    with stranger(decode) as sock, contextlib.suppress(OSError):
        sock.sendall(b"\x00\x00\x00\x31")
        for byte in b"phloem-transfer/1" + bytes(32):
            sock.sendall(bytes([byte]))
            time.sleep(0.05)  # each read gets its byte in time
    assert time.monotonic() - started < 1.5
    decode.endpoint.close(0.0)


def test_silent_strangers_are_few_and_hung_up_on() -> None:
    decode = Recorded(transfer_config(DECODE, accepts=True, timeout_s=0.5))
    strangers = [stranger(decode) for _ in range(MAX_STRANGERS_PER_HOST)]
    with stranger(decode) as one_more:
        assert is_closed_by_peer(one_more)
    assert is_closed_by_peer(strangers[0]), "within the handshake's deadline"
    for sock in strangers:
        sock.close()
    wait_until(lambda: _can_open(decode))
    decode.endpoint.close(0.0)


def _can_open(decode: Recorded) -> bool:
    try:
        rogue, answer = dial_open(decode.endpoint.address, open_request(channel_name="later"))
    except (PhloemError, OSError):
        return False
    rogue.close()
    return isinstance(answer, Opened)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"decode": PeerRef(DECODE.worker_id, DECODE.epoch - 1)}, "stale_epoch"),
        ({"decode": PeerRef("decode-b", DECODE.epoch)}, "stale_epoch"),
        ({"kv_layout": "qwen2/bfloat16/16"}, "kv_layout_mismatch"),
        ({"staging_bytes": 0}, "transfer_protocol"),
        ({"channel_name": "x" * 2000}, "transfer_protocol"),
        ({"prefill": PeerRef("x" * 2000, 1)}, "transfer_protocol"),
    ],
)
def test_open_that_does_not_fit_is_refused(decode: Recorded, changes: dict[str, object], code: str) -> None:
    rogue, answer = dial_open(decode.endpoint.address, open_request(**changes))
    assert isinstance(answer, Refused) and answer.code == code
    rogue.close()
    decode.assert_silent()


@pytest.mark.parametrize(
    ("peer", "layout", "code"),
    [
        (PeerRef(DECODE.worker_id, DECODE.epoch - 1), "llama/float32/16", "stale_epoch"),
        (DECODE, "qwen2/bfloat16/16", "kv_layout_mismatch"),
    ],
)
def test_dialer_is_told_once_and_gives_up(
    decode: Recorded, peer: PeerRef, layout: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    prefill = Recorded(transfer_config(PREFILL, layout=layout))
    prefill.endpoint.peer_up(peer, decode.endpoint.address)
    lost = prefill.next(ChannelLost)
    assert (lost.peer, lost.error.code, lost.error.retryable) == (peer, code, False)
    assert f"{peer.worker_id} (epoch {peer.epoch}) refuses KV transfer: " in caplog.text
    prefill.assert_silent(0.2)
    prefill.endpoint.close()


def test_newer_epoch_of_a_prefill_worker_ends_the_older_channel_and_bars_it(decode: Recorded) -> None:
    newer = PeerRef(PREFILL.worker_id, PREFILL.epoch + 1)
    with rogue_prefill(decode):
        successor = Recorded(transfer_config(newer))
        successor.endpoint.peer_up(DECODE, decode.endpoint.address)
        assert decode.next(ChannelLost).peer == PREFILL
        assert decode.next(ChannelOpened).peer == newer
        assert not decode.endpoint.is_open(PREFILL, "decode")
    late, answer = dial_open(decode.endpoint.address, open_request(channel_name="late"))
    assert isinstance(answer, Refused) and answer.code == "stale_epoch"
    late.close()
    assert decode.endpoint.is_open(newer, "decode")
    successor.endpoint.close(0.0)


def test_newer_epoch_of_a_decode_worker_replaces_the_older_one() -> None:
    with joined() as pair:
        newer = PeerRef(DECODE.worker_id, DECODE.epoch + 1)
        restarted = Recorded(transfer_config(newer, accepts=True))
        pair.prefill.endpoint.peer_up(newer, restarted.endpoint.address)
        assert pair.prefill.next(ChannelLost).peer == DECODE
        assert pair.prefill.next(ChannelOpened).peer == newer
        assert list(pair.prefill.endpoint.stats()) == [newer]
        restarted.endpoint.close(0.0)


def test_peer_up_twice_dials_once() -> None:
    with joined() as pair:
        pair.prefill.endpoint.peer_up(DECODE, pair.decode.endpoint.address)
        pair.prefill.assert_silent(0.1)
        pair.decode.assert_silent()


@pytest.mark.parametrize("address", ["", "nowhere", "host:", "host:port", "host:0", "host:65536", ":80"])
def test_bad_address_is_refused_at_once(address: str) -> None:
    prefill = Recorded(transfer_config(PREFILL))
    prefill.endpoint.peer_up(DECODE, address)
    error = prefill.next(ChannelLost).error
    assert (error.code, error.retryable) == ("bad_address", False)
    prefill.endpoint.close()


def test_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(PhloemError) as caught:
        Recorded(msgspec.structs.replace(transfer_config(DECODE, accepts=True), host="192.0.2.1"))
    assert caught.value.code == "address_unavailable"


def test_dialing_goes_on_until_the_peer_listens() -> None:
    with socket.create_server((HOST, 0)) as placeholder:
        port = placeholder.getsockname()[1]
    prefill = Recorded(transfer_config(PREFILL))
    prefill.endpoint.peer_up(DECODE, f"{HOST}:{port}")
    prefill.assert_silent(0.2)
    with socket.create_server((HOST, port)) as server:
        server.settimeout(5.0)
        sock, _ = server.accept()
        sock.close()
        again, _ = server.accept()
        again.close()
    prefill.endpoint.close()


def test_too_many_channels_are_refused_for_now() -> None:
    config = transfer_config(DECODE, accepts=True)
    assert refusal(open_request(), config, 0, MAX_CHANNELS - 1) is None
    refused = refusal(open_request(), config, 0, MAX_CHANNELS)
    assert refused is not None and refused.code == "overloaded"


def test_nccl_that_cuts_messages_otherwise_is_refused_with_both_terms() -> None:
    ours, theirs = (
        describe_link((2, 28, 9), 16, {"NCCL_P2P_NVL_CHUNKSIZE": chunk}) for chunk in ("65536", "524288")
    )
    config = msgspec.structs.replace(transfer_config(DECODE, accepts=True), link=ours)
    assert refusal(open_request(link=ours), config, 0, 0) is None
    refused = refusal(open_request(link=theirs), config, 0, 0)
    assert refused is not None and refused.code == "link_mismatch"
    assert ours in refused.message and theirs in refused.message


@pytest.mark.parametrize("cpu", ["prefill", "decode"])
def test_cpu_and_gpu_are_not_joined_though_their_layouts_are_equal(cpu: str) -> None:
    """float32 on both; Gloo would wait for NCCL."""
    nccl = describe_link((2, 28, 9), 16, {})
    ours, theirs = (nccl, "") if cpu == "prefill" else ("", nccl)
    config = msgspec.structs.replace(transfer_config(DECODE, accepts=True), link=ours)
    refused = refusal(open_request(link=theirs), config, 0, 0)
    assert refused is not None and refused.code == "link_mismatch"
    assert nccl in refused.message and "Gloo" in refused.message and "--device cpu" in refused.message


def test_terms_of_a_link_are_those_that_must_be_equal() -> None:
    plain = describe_link((2, 28, 9), 16, {"HOME": "/root"})
    assert plain == f"NCCL 2.28.9, --transfer-max-ctas 16, NCCL_P2P_NVL_CHUNKSIZE={NVLINK_CHUNK_BYTES}"
    others = [
        describe_link((2, 27, 3), 16, {}),
        describe_link((2, 28, 9), 8, {}),
        describe_link((2, 28, 9), 16, {"NCCL_BUFFSIZE": "1048576"}),
    ]
    assert len({plain, *others}) == 4
    assert link_terms("cpu", 16) == ""


def test_refusal_for_the_link_ends_dialing() -> None:
    decode = Recorded(msgspec.structs.replace(transfer_config(DECODE, accepts=True), link="NCCL 1"))
    prefill = Recorded(msgspec.structs.replace(transfer_config(PREFILL), link="NCCL 2"))
    try:
        prefill.endpoint.peer_up(DECODE, decode.endpoint.address)
        lost = prefill.next(ChannelLost)
        assert (lost.error.code, lost.error.retryable) == ("link_mismatch", False)
    finally:
        prefill.endpoint.close(0.0)
        decode.endpoint.close(0.0)


def test_seen_epochs_keep_the_newest_and_forget_the_oldest_worker() -> None:
    seen = SeenEpochs()
    seen.note("a", 5)
    seen.note("a", 4)
    assert (seen.newest("a"), seen.newest("b")) == (5, 0)
    for n in range(MAX_REMEMBERED_WORKERS):
        seen.note(f"w{n}", 1)
    assert (seen.newest("a"), seen.newest("w0")) == (0, 1)

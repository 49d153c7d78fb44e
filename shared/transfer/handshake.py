"""Both ends of a control connection prove that they know the cluster secret, before anything else, and before
one deadline for all of it.

    dialer   -> MAGIC, nonce d
    listener -> nonce l, HMAC(key, "listener", d, l)
    dialer   -> HMAC(key, "dialer", l, d)

The labels keep one side's proof from being played back as the other's. The frames after it are neither
encrypted nor signed: the transfer network is the cluster's own.
"""

from __future__ import annotations

import hmac
import secrets
import time
from hashlib import blake2b, sha256

from phloem.shared.errors import PhloemError
from phloem.shared.transfer.frames import FrameSocket

HANDSHAKE_TIMEOUT_S = 3.0
_MAGIC = b"phloem-transfer/1"
_NONCE_BYTES = 32
_MAX_FRAME_BYTES = 128
_REMEDY = "give all services the same --cluster-secret"


def transfer_key(cluster_secret: bytes) -> bytes:
    """The key of the challenge; the secret itself never crosses a wire."""
    return blake2b(cluster_secret, digest_size=32, person=b"phloem-transfer").digest()


def prove_as_dialer(frames: FrameSocket, key: bytes, deadline: float) -> None:
    """Raises `unauthenticated` when the listener can't prove itself."""
    ours = secrets.token_bytes(_NONCE_BYTES)
    frames.write(_MAGIC + ours, deadline)
    answer = frames.read(_MAX_FRAME_BYTES, deadline)
    theirs, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
    _check(len(theirs) == _NONCE_BYTES and hmac.compare_digest(proof, _mac(key, b"listener", ours, theirs)))
    frames.write(_mac(key, b"dialer", theirs, ours), deadline)


def prove_as_listener(frames: FrameSocket, key: bytes, deadline: float) -> None:
    """Raises `unauthenticated` when the dialer can't prove itself, or does not take our proof."""
    hello = frames.read(_MAX_FRAME_BYTES, deadline)
    theirs = hello[len(_MAGIC) :]
    if not hello.startswith(_MAGIC) or len(theirs) != _NONCE_BYTES:
        raise _unauthenticated("whoever dials is no transfer peer of this version")
    ours = secrets.token_bytes(_NONCE_BYTES)
    frames.write(ours + _mac(key, b"listener", theirs, ours), deadline)
    try:
        proof = frames.read(_MAX_FRAME_BYTES, deadline)
    except PhloemError as error:
        if error.code != "channel_lost":
            raise
        raise _unauthenticated(
            f"the transfer peer hung up on this worker's proof, as with another cluster secret: {_REMEDY}"
        ) from error
    _check(hmac.compare_digest(proof, _mac(key, b"dialer", ours, theirs)))


def handshake_deadline(timeout_s: float) -> float:
    """Of `time.monotonic`, for the proofs and the opening messages together."""
    return time.monotonic() + min(HANDSHAKE_TIMEOUT_S, timeout_s)


def _mac(key: bytes, label: bytes, first_nonce: bytes, second_nonce: bytes) -> bytes:
    return hmac.digest(key, label + b"\0" + first_nonce + second_nonce, sha256)


def _check(proven: bool) -> None:
    if not proven:
        raise _unauthenticated(f"the transfer peer has another cluster secret than this worker: {_REMEDY}")


def _unauthenticated(message: str) -> PhloemError:
    return PhloemError("unauthenticated", message, http_status=401)

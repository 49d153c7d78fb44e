"""The typed errors of the transfer layer."""

from __future__ import annotations

from phloem.shared.errors import PhloemError


def channel_lost(message: str) -> PhloemError:
    """The channel broke or is not open: the hand-over may succeed on another one."""
    return PhloemError("channel_lost", message, retryable=True, http_status=503)


def protocol_violation(message: str) -> PhloemError:
    """The peer broke a rule of the protocol: the channel fails closed."""
    return PhloemError("transfer_protocol", message, retryable=True, http_status=503)


def transfer_timeout(message: str) -> PhloemError:
    """An operation passed its deadline."""
    return PhloemError("transfer_timeout", message, retryable=True, http_status=504)


def staging_full(message: str) -> PhloemError:
    """A side has no staging memory for one more channel: one may open when another has ended."""
    return PhloemError("staging_full", message, retryable=True, http_status=503)

"""Prefill engine <-> decode engine: the control stream of one channel, in order.

The prefill side dials. Life of one request on it: decode sends `Ready` (it holds the first pages and has
reserved the rest); prefill sends `Piece` headers, each followed by its bytes on the channel in the same
order and by its `PieceDigest`, and `Last`; decode returns a `Credit` for each staging slot it has emptied,
and `Admitted` when all is checked. Either side may send `Cancel` at any time; pieces already under way are
received and dropped.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from phloem.shared.protocol.codec import Codec
from phloem.shared.protocol.session import PeerRef


class Open(msgspec.Struct, frozen=True, tag="open"):
    """First message of the prefill side, after authentication; `kv_layout` and `link` (what NCCL runs with;
    "" on a CPU) must equal the decode side's, and `device_id` (of the GPU; "" on a CPU) must not."""

    prefill: PeerRef
    decode: PeerRef
    kv_layout: str
    staging_bytes: int
    channel_name: str  # both workers and epochs, and never the same twice
    device_id: str = ""
    link: str = ""


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """The decode side accepts: the slot size agreed on, and the first credits."""

    staging_bytes: int
    credits: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Instead of `Opened`; from the prefill side instead of `Open`, when it has no memory for the channel."""

    code: str
    message: str


class Rendezvous(msgspec.Struct, frozen=True, tag="rendezvous"):
    """After `Opened`, both ways: what a rank tells the other so that both join the process group."""

    key: str
    value: bytes


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Decode has pages for the whole prompt and holds the KV of the first `num_held_pages` already."""

    request_id: str
    attempt: int
    num_held_pages: int


class Piece(msgspec.Struct, frozen=True, tag="piece"):
    """Header of one staging slot of KV: pages [page_start, page_start + num_pages) of the request's prompt,
    layers [layer_start, layer_end), laid out as [layer, k/v, page, token, head, dim]."""

    request_id: str
    attempt: int
    page_start: int
    num_pages: int
    layer_start: int
    layer_end: int
    num_bytes: int
    digest: int = 0  # comes in `PieceDigest`: the header leaves while the pages are still being gathered


class PieceDigest(msgspec.Struct, frozen=True, tag="digest"):
    """Of the channel's oldest piece that had none yet; it may come after the request's `Last`."""

    digest: int


class Last(msgspec.Struct, frozen=True, tag="last"):
    """All pieces of the request were sent. `token_ids` is token 0; `num_pieces` lets decode prove that none
    is missing. A request that ends with token 0 gets a `Cancel` instead."""

    request_id: str
    attempt: int
    num_pieces: int
    token_ids: list[int]


class Admitted(msgspec.Struct, frozen=True, tag="admitted"):
    """Decode has the whole KV of the request, and it generates from now on. Nothing waits for this: it tells
    the prefill side how much of the transfer was not hidden."""

    request_id: str
    attempt: int


class Credit(msgspec.Struct, frozen=True, tag="credit"):
    num_slots: int


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    request_id: str
    attempt: int
    code: str = "aborted"
    message: str = ""


TransferMessage: TypeAlias = (
    Open | Opened | Refused | Rendezvous | Ready | Piece | PieceDigest | Last | Admitted | Credit | Cancel
)

transfer_message: Codec[TransferMessage] = Codec(TransferMessage, max_bytes=1024 * 1024)

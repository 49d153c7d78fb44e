"""Bandwidth command <-> its two ranks: MessagePack frames over a socket pair."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.codec import Codec
from phloem.shared.transfer.events import Side


class KvShape(msgspec.Struct, frozen=True, kw_only=True):
    """The KV of a model; `dtype` as torch names it. One rank of a pair holds whole pages."""

    num_layers: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"


class RankSetup(msgspec.Struct, frozen=True, tag="setup", kw_only=True):
    """First message. The prefill rank gets the decode rank's `Listening`. `pool_pages` is the size of the KV
    pool. `staging_bytes`, `staging_slots`, `max_ctas` 0: the product's own defaults."""

    side: Side
    device: str
    shape: KvShape
    pool_pages: int
    message_bytes: int  # the largest raw message
    staging_bytes: int = 0
    staging_slots: int = 0
    max_ctas: int = 0
    timeout_s: float = 30.0
    transfer_address: str = ""
    raw_port: int = 0


class Listening(msgspec.Struct, frozen=True, tag="listening"):
    """Decode rank: dial me."""

    transfer_address: str
    raw_port: int


class Joined(msgspec.Struct, frozen=True, tag="joined"):
    """Both channels are open."""

    page_bytes: int
    device_name: str
    staging_bytes: int
    staging_slots: int
    max_ctas: int


class RawRun(msgspec.Struct, frozen=True, tag="raw"):
    """Send `count` messages in one piece each: one after another, or `ahead`, all posted at once."""

    num_bytes: int
    count: int
    ahead: bool


class PagesRun(msgspec.Struct, frozen=True, tag="pages"):
    """Hand over `count` requests of `num_pages` pages each, likewise."""

    num_pages: int
    count: int
    ahead: bool


class CheckContent(msgspec.Struct, frozen=True, tag="check"):
    """Sum up the pages of the requests of the last `PagesRun`."""


class Times(msgspec.Struct, frozen=True, tag="times"):
    """When each message began (prefill rank) or was wholly there (decode rank); one for all with `ahead`.
    Seconds of the machine's monotonic clock, which both ranks share."""

    at_s: list[float]


class Content(msgspec.Struct, frozen=True, tag="content"):
    """A number for K and one for V of each layer; equal on both sides when every byte of every page is."""

    sums: list[int]


class RankFailed(msgspec.Struct, frozen=True, tag="failed"):
    error: ErrorInfo


RankDown: TypeAlias = RankSetup | RawRun | PagesRun | CheckContent
RankUp: TypeAlias = Listening | Joined | Times | Content | RankFailed

rank_down: Codec[RankDown] = Codec(RankDown)
rank_up: Codec[RankUp] = Codec(RankUp)

"""What an engine is made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from phloem.shared.engine.grammar.parts import GrammarParts
from phloem.shared.engine.handover import Channels, PageStore
from phloem.shared.engine.limits import Limits
from phloem.shared.engine.page_account import PageAccount
from phloem.shared.engine.step_runner import StepRunner
from phloem.shared.protocol.engine import EngineUp
from phloem.shared.protocol.session import PeerRef
from phloem.shared.transfer.stats import SendRates, TransferStatus


class Peers(Channels, Protocol):
    """What the loop needs of `TransferEndpoint` beyond hand-overs."""

    def peer_up(self, peer: PeerRef, address: str) -> None: ...
    def peer_down(self, peer: PeerRef) -> None: ...


class EngineParts(NamedTuple):
    """The tests exchange the runner and the channels."""

    limits: Limits
    account: PageAccount
    runner: StepRunner
    channels: Peers
    store: PageStore
    send: Callable[[EngineUp], None]
    dials_peers: bool  # prefill and unified workers
    eos_token_ids: tuple[int, ...]
    context_length: int
    handover_timeout_s: float
    overlap: bool = True
    grammars: GrammarParts | None = None  # none: requests with a grammar are refused
    send_rates: Callable[[], SendRates] = SendRates
    transfer_status: Callable[[], TransferStatus] = TransferStatus
    hang_timeout_s: float = 120.0
    clock: Callable[[], float] = time.monotonic

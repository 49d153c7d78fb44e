"""A request inside the engine: its tokens, its pages, and how far it has been computed.

token_ids          |--------- prompt ---------|--- generated ---|(+ num_pending, still on the device)
num_computed_tokens|--- KV is in pages ---------->|
page_ids           [ borrowed from the tree, locked by `node` | own pages ........ | one may be partial ]
                     num_tree_pages                             len(page_ids) - num_tree_pages
"""

from __future__ import annotations

import enum

from phloem.shared.engine.grammar.constraint import Constraint
from phloem.shared.engine.kv_pool import OwnerKey
from phloem.shared.engine.radix_node import Node
from phloem.shared.protocol.session import PeerRef, Phase, SamplingParams, Submit


class Status(enum.Enum):
    """Where a request is; the scheduler moves it."""

    WAITING = "waiting"  # no pages, no slot
    RECEIVING = "receiving"  # decode side of a hand-over: pages and slot reserved, KV under way
    RUNNING = "running"  # has a slot; some of its tokens are computed each step
    SENDING = "sending"  # prefill side of a hand-over: token 0 made, pages held until they are sent
    RETRACTED = "retracted"  # gives its pages back as soon as no launched step uses them; then WAITING
    ENDED = "ended"  # its pages return as soon as no launched step uses them


class Request:
    """One (request, attempt). Mutated by the scheduler and the hand-over only."""

    __slots__ = (
        "admitted_s",
        "arrived_s",
        "attempt",
        "block_hashes",
        "constraint",
        "deadline_s",
        "gateway",
        "inserted_tokens",
        "node",
        "num_bound_pages",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_in_flight",
        "num_pending",
        "num_prompt_tokens",
        "num_submitted_tokens",
        "num_tree_pages",
        "order",
        "page_ids",
        "peer",
        "phase",
        "request_id",
        "salt",
        "sampling",
        "slot",
        "status",
        "stop_token_ids",
        "times_passed",
        "token_ids",
        "token_limit",
    )

    def __init__(
        self,
        submit: Submit,
        *,
        gateway: int,
        order: int,
        eos_token_ids: tuple[int, ...],
        context_length: int,
        now_s: float,
    ) -> None:
        sampling = submit.sampling
        self.request_id = submit.request_id
        self.attempt = submit.attempt
        self.gateway = gateway
        self.phase: Phase = submit.phase
        self.peer: PeerRef | None = submit.peer
        self.token_ids = list(submit.token_ids)
        self.num_prompt_tokens = submit.num_prompt_tokens
        self.num_submitted_tokens = len(submit.token_ids)  # the prompt and what others made of the answer
        self.sampling: SamplingParams = sampling
        self.stop_token_ids = frozenset(sampling.stop_token_ids) | frozenset(
            () if sampling.ignore_eos and sampling.grammar is None else eos_token_ids
        )
        self.constraint = Constraint(sampling.grammar) if sampling.grammar is not None else None
        # Known tokens never exceed this; a prefill worker makes one token and hands over.
        self.token_limit = min(submit.num_prompt_tokens + sampling.max_tokens, context_length)
        self.salt = submit.cache_salt
        self.block_hashes = list(submit.block_hashes)
        self.order = order
        self.status = Status.WAITING
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_pending = 0
        self.num_in_flight = 0  # launched steps that use its pages and are not collected yet
        self.page_ids: list[int] = []
        self.num_tree_pages = 0
        self.node: Node | None = None
        self.inserted_tokens = 0  # tokens up to which the tree was offered its pages
        self.slot = -1
        self.num_bound_pages = -1  # pages that the runner's table of this slot knows; -1: slot not set up
        self.times_passed = 0
        self.arrived_s = now_s
        self.admitted_s = 0.0  # first got pages and a slot; the loop sets it
        self.deadline_s = now_s + submit.timeout_s

    @property
    def key(self) -> OwnerKey:
        return (self.request_id, self.attempt)

    @property
    def num_known_tokens(self) -> int:
        """Tokens whose values exist on the host or the device."""
        return len(self.token_ids) + self.num_pending

    @property
    def awaits_grammar(self) -> bool:
        return self.constraint is not None and not self.constraint.is_ready

    @property
    def num_generated(self) -> int:
        return self.num_known_tokens - self.num_prompt_tokens

    @property
    def num_made(self) -> int:
        """Tokens that this engine made for this attempt, the pending one included."""
        return self.num_known_tokens - self.num_submitted_tokens

    @property
    def own_page_ids(self) -> list[int]:
        return self.page_ids[self.num_tree_pages :]

    @property
    def wants_compute(self) -> bool:
        """Whether another forward pass over its uncomputed tokens makes a token that it may still emit."""
        if self.phase == "prefill" and self.num_made:
            return False
        return self.num_computed_tokens < self.num_known_tokens < self.token_limit

"""Gateway <-> worker: one bidirectional stream per pair of processes.

Down: `Hello` once, then `Submit` and `Abort`. Up: `Welcome` once, then at most one `StepMessage` per engine
step, which holds what that step made for *all* of this gateway's requests, and `LoadReport`s.

Every `Submit` gets exactly one `Ended` from each worker it was sent to, whatever happens, unless the
session itself breaks; `TokensOut` come before it, in order. A worker's `Ended` is not the client's end of
the request: a prefill worker ends with `handed_over`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.cluster import WorkerLoad
from phloem.shared.protocol.codec import Codec

PROTOCOL_VERSION = 1

FinishReason: TypeAlias = Literal["stop", "length", "abort"]
EndReason: TypeAlias = Literal["finished", "handed_over", "aborted", "failed"]
Phase: TypeAlias = Literal["prefill", "decode", "both"]


GrammarKind: TypeAlias = Literal["json_object", "json_schema", "regex", "ebnf"]


class Grammar(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the whole answer must be: any JSON object, JSON of a schema, a match of a regular expression, or a
    word of a grammar in EBNF (GBNF's notation, rule `root`). `source` is "" for `json_object`."""

    kind: GrammarKind
    source: str = ""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are chosen. The gateway has validated every field and drawn a seed.

    The token at absolute position p is argmax(log-probabilities after temperature and filters + Gumbel
    noise of (seed, p, vocabulary index)); `temperature == 0` is plain argmax. Filters apply in the order
    top_k, top_p, min_p, as in Hugging Face.
    """

    max_tokens: int  # generated tokens in all, counted from the end of the original prompt
    temperature: float = 1.0
    top_p: float = 1.0  # 1.0 is off
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # 0.0 is off
    seed: int = 0  # 64 bits, signed
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own end tokens
    grammar: Grammar | None = None  # with one, the model's own end tokens always end the answer


class PeerRef(msgspec.Struct, frozen=True):
    """The other worker of a (prefill, decode) pair; a message for another epoch is refused."""

    worker_id: str
    epoch: int

    def __str__(self) -> str:
        """For people."""
        return f"{self.worker_id} (epoch {self.epoch})"


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    gateway_id: str
    protocol_version: int = PROTOCOL_VERSION


class Submit(msgspec.Struct, frozen=True, tag="submit", kw_only=True):
    """Asks a worker to do its phase of a request.

    `token_ids` is the prompt and, when a request is resumed, the tokens already emitted;
    `num_prompt_tokens` is the length of the original prompt, so that `len(token_ids) - num_prompt_tokens`
    tokens count as generated. `phase`: "prefill" hands over to `peer`, "decode" waits for `peer`,
    "both" does all here (unified workers and local prefill; `peer` is None). `attempt` grows each time the
    gateway submits the request anew; outputs of an old attempt are dropped. `block_hashes` are of the full
    64-token blocks of `token_ids`. `cache_salt` separates tenants in the radix tree.
    """

    request_id: str
    attempt: int
    epoch: int  # the worker's; another epoch is refused
    phase: Phase
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    peer: PeerRef | None = None
    block_hashes: list[bytes] = []
    cache_salt: str = ""
    timeout_s: float = 600.0  # from submission to the worker's Ended


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """The client went away, a stop string hit, or the attempt was given up."""

    request_id: str
    attempt: int


SessionDown: TypeAlias = Hello | Submit | Abort


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    worker_id: str
    epoch: int
    role: str
    protocol_version: int = PROTOCOL_VERSION


class TokensOut(msgspec.Struct, frozen=True, tag="tokens", omit_defaults=True):
    """Tokens that one step made for one request.

    `start` is the index of the first of them among the request's generated tokens (token 0 is 0), also
    across attempts. `finish_reason` is set with the last tokens of the request. `num_cached_tokens` of the
    prompt were found in this worker's radix tree. `timeline` holds seconds since the submission arrived,
    by event name; it comes with a worker's first tokens.
    """

    request_id: str
    attempt: int
    start: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    timeline: dict[str, float] = {}


class Ended(msgspec.Struct, frozen=True, tag="ended", omit_defaults=True):
    """The worker is done with (request, attempt): its pages are free or in the tree, or return with the step
    that is on the device now. `error` comes with "failed"."""

    request_id: str
    attempt: int
    reason: EndReason
    error: ErrorInfo | None = None


Output: TypeAlias = TokensOut | Ended


class StepMessage(msgspec.Struct, frozen=True, tag="step"):
    """What one engine step made for one gateway."""

    epoch: int
    step: int
    outputs: list[Output]


class LoadReport(msgspec.Struct, frozen=True, tag="load"):
    """The worker's load, soon after it changed; gateways that read slowly are not told every change."""

    epoch: int
    load: WorkerLoad


SessionUp: TypeAlias = Welcome | StepMessage | LoadReport

session_down: Codec[SessionDown] = Codec(SessionDown)
session_up: Codec[SessionUp] = Codec(SessionUp)

"""An `Engine` without a model or threads: the test takes its turns and moves its clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from phloem.shared.block_hash import BlockHasher
from phloem.shared.engine.engine_loop import Engine
from phloem.shared.engine.engine_parts import EngineParts, Peers
from phloem.shared.engine.grammar.masks import TokenMasks
from phloem.shared.engine.grammar.parts import GrammarParts
from phloem.shared.engine.kv_pool import KVPool
from phloem.shared.engine.limits import Limits
from phloem.shared.engine.page_account import PageAccount
from phloem.shared.engine.radix_tree import RadixTree
from phloem.shared.engine.step_plan import Row, StepPlan
from phloem.shared.engine.step_runner import LayerWatch
from phloem.shared.protocol.engine import (
    AuditReply,
    AuditRequest,
    EngineMessage,
    EngineSubmit,
    EngineUp,
    StepReport,
)
from phloem.shared.protocol.session import Grammar, PeerRef, Phase, SamplingParams, Submit
from phloem.shared.transfer.pending import DONE, Incoming, Moved, MovedNow
from phloem.shared.transfer.stats import TransferStatus
from tests.support.handover_wire import Wire
from tests.support.streams import Stream

EOS = 0
CONTEXT = 200
HANDOVER_TIMEOUT_S = 30.0
_MODULUS = 2**31 - 1


def next_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """What the fake model generates after `prompt`: each token depends on every token before it."""
    chain = 0
    for token in prompt:
        chain = _link(chain, token)
    made: list[int] = []
    for _ in range(count):
        made.append(_token(chain))
        chain = _link(chain, made[-1])
    return made


def _link(chain: int, token: int) -> int:
    return (chain * 1_000_003 + token + 1) % _MODULUS


def _token(chain: int) -> int:
    return chain % 97 + 1


class FakeStep:
    def __init__(self, device: FakeDevice, token_ids: list[int]) -> None:
        self._device = device
        self._token_ids = token_ids
        self._number = device.num_launched
        self._asked = False

    def ready(self) -> bool:
        """A device that runs ahead is done with a step when the next one has been launched, or when it is
        asked for the second time: then there is nothing else to launch."""
        done = not self._device.runs_ahead or self._device.num_launched > self._number or self._asked
        self._asked = True
        return done

    def sample(self, masks: TokenMasks) -> None:
        raise AssertionError("this device knows no grammars")

    def token_ids(self) -> list[int]:
        self._device.num_collected += 1
        return self._token_ids


class FakeDevice:
    """Runner and page store. The only state of the model is the KV in its pages: a chain over all tokens
    before, so that one wrong, missing or overwritten page changes every later token."""

    num_layers = 1

    def __init__(self, num_pages: int, page_size: int, num_slots: int, *, runs_ahead: bool) -> None:
        self.runs_ahead = runs_ahead
        self.layer_page_bytes = 8 * page_size
        self.num_launched = 0
        self.num_collected = 0
        self.most_in_flight = 0
        self.num_rows = 0
        self.num_fences = 0
        self.plans: list[StepPlan] = []
        self._page_size = page_size
        self._kv = np.full((num_pages, page_size), -1, dtype=np.int64)
        self._last_token = [-1] * num_slots

    def launch(self, plan: StepPlan, watch: LayerWatch | None = None) -> FakeStep:
        assert plan.rows
        self.num_launched += 1
        self.num_rows += len(plan.rows)
        self.most_in_flight = max(self.most_in_flight, self.num_launched - self.num_collected)
        self.plans.append(plan)
        made = [self._compute(row) for row in plan.rows]
        if watch is not None:
            watch.all_at(DONE)
        return FakeStep(self, [token for token, row in zip(made, plan.rows, strict=True) if row.samples])

    def gather(
        self, page_ids: Sequence[int], layer_start: int, layer_end: int, out: Tensor, beside: int = 0
    ) -> Moved:
        del beside
        data = np.ascontiguousarray(self._kv[list(page_ids)])
        out[: data.nbytes].copy_(torch.from_numpy(data.view(np.uint8).reshape(-1)))
        return MovedNow(int(data.sum()))

    def scatter(
        self,
        page_ids: Sequence[int],
        layer_start: int,
        layer_end: int,
        data: Tensor,
        after: Incoming | None = None,
        beside: int = 0,
    ) -> Moved:
        del beside
        pages = data.numpy().copy().view(np.int64).reshape(len(page_ids), self._page_size)
        self._kv[list(page_ids)] = pages
        return MovedNow(int(pages.sum()))

    def fence(self) -> None:
        self.num_fences += 1

    def withdraw(self, scatters: Iterable[Moved]) -> None:
        del scatters

    def _compute(self, row: Row) -> int:
        request = row.request
        chain = self._read(request.page_ids, row.start - 1) if row.start else 0
        for position in range(row.start, row.start + row.num_tokens):
            token = self._last_token[request.slot] if row.from_device else request.token_ids[position]
            chain = _link(chain, token)
            page, offset = divmod(position, self._page_size)
            self._kv[request.page_ids[page], offset] = chain
        if row.samples:
            self._last_token[request.slot] = _token(chain)
        return _token(chain)

    def _read(self, page_ids: list[int], position: int) -> int:
        page, offset = divmod(position, self._page_size)
        return int(self._kv[page_ids[page], offset])


class EngineWorld:
    """One engine; its `streams` are by request id. `channels` are an end of a `Wire`."""

    def __init__(
        self,
        channels: Peers | None = None,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        budget: int = 32,
        slots: int = 8,
        max_queued: int = 100,
        runs_ahead: bool = True,
        overlap: bool = True,
        dials_peers: bool = True,
        reuse: bool = True,
        device: FakeDevice | None = None,
        grammars: GrammarParts | None = None,
    ) -> None:
        self.now_s = 1000.0
        self.transfer = TransferStatus()
        self.device = device or FakeDevice(num_pages, page_size, slots, runs_ahead=runs_ahead)
        self.said: list[EngineUp] = []
        self.streams: dict[str, Stream] = {}
        self._num_tags = 0
        tree = RadixTree(page_size)
        self.engine = Engine(
            EngineParts(
                limits=Limits(budget, slots, max_queued),
                account=PageAccount(KVPool(num_pages), tree, BlockHasher(b"test"), reuse=reuse),
                runner=self.device,
                channels=channels or Wire(is_open=False).prefill,
                store=self.device,
                send=self._take,
                dials_peers=dials_peers,
                eos_token_ids=(EOS,),
                context_length=CONTEXT,
                handover_timeout_s=HANDOVER_TIMEOUT_S,
                overlap=overlap,
                grammars=grammars,
                transfer_status=lambda: self.transfer,
                clock=lambda: self.now_s,
            )
        )

    def submit(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int = 5,
        *,
        phase: Phase = "both",
        peer: PeerRef | None = None,
        stop: tuple[int, ...] = (),
        gateway: int = 0,
        num_prompt_tokens: int | None = None,
        timeout_s: float = 600.0,
        grammar: Grammar | None = None,
    ) -> Stream:
        count = len(prompt) if num_prompt_tokens is None else num_prompt_tokens
        stream = self.streams[request_id] = Stream(len(prompt) - count + (phase == "decode"))
        submit = Submit(
            request_id=request_id,
            attempt=1,
            epoch=1,
            phase=phase,
            token_ids=prompt,
            num_prompt_tokens=count,
            sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=stop, grammar=grammar),
            peer=peer,
            timeout_s=timeout_s,
        )
        self.engine.deliver(EngineSubmit(gateway, submit))
        return stream

    def turn(self, *messages: EngineMessage) -> bool:
        """Delivers messages and takes one turn; at most one report is sent in it."""
        for message in messages:
            self.engine.deliver(message)
        before = len(self.reports)
        busy = self.engine.turn()
        assert len(self.reports) <= before + 1, "one report a turn"
        return busy

    def turn_until(self, condition: Callable[[], object], max_turns: int = 500) -> None:
        for _ in range(max_turns):
            if condition():
                return
            self.turn()
        raise AssertionError(f"not within {max_turns} turns")

    def run(self, max_turns: int = 3000) -> None:
        """Turns, audited, until nothing is left to do without a message."""
        for _ in range(max_turns):
            self.audit()
            if not self.turn():
                return
        raise AssertionError("the engine does not come to rest")

    def audit(self) -> AuditReply:
        """A clean audit; it costs a turn."""
        self._num_tags += 1
        self.turn(AuditRequest(self._num_tags))
        reply = next(m for m in reversed(self.said) if isinstance(m, AuditReply))
        assert reply.tag == self._num_tags
        assert reply.problems == []
        assert reply.free_pages + reply.tree_pages + reply.request_pages == reply.total_pages
        return reply

    def assert_idle(self) -> None:
        """Every request has had its end, and nothing of any is left."""
        self.run()
        reply = self.audit()
        assert reply.num_requests == reply.request_pages == reply.locked_nodes == 0
        assert self.device.num_launched == self.device.num_collected
        assert all(stream.ended is not None for stream in self.streams.values())

    @property
    def reports(self) -> list[StepReport]:
        return [message for message in self.said if isinstance(message, StepReport)]

    def _take(self, message: EngineUp) -> None:
        self.said.append(message)
        if isinstance(message, StepReport):
            for group in message.outputs:
                for output in group.outputs:
                    self.streams[output.request_id].take(output)

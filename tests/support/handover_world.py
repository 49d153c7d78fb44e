"""A hand-over's sender and receiver, joined by a `Wire`, with a clock that the test moves."""

from __future__ import annotations

from phloem.shared.engine.handover import Ended
from phloem.shared.engine.handover_receive import HandoverReceiver
from phloem.shared.engine.handover_send import HandoverSender
from phloem.shared.engine.kv_pool import OwnerKey
from phloem.shared.engine.requests import Request
from phloem.shared.engine.step_plan import Row
from phloem.shared.engine.step_runner import LayerWatch
from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.session import PeerRef, Phase, SamplingParams, Submit
from phloem.shared.transfer.events import (
    AdmittedReceived,
    CancelReceived,
    ChannelLost,
    ChannelOpened,
    LastReceived,
    PieceReceived,
    ReadyReceived,
    SlotAvailable,
    TransferEvent,
)
from phloem.shared.transfer.pending import DONE
from phloem.shared.transfer.stats import SendRates
from tests.support.handover_wire import D, FakePageStore, P, Wire

PAGE = 4  # tokens
TIMEOUT_S = 10.0
NOT_MEASURED = SendRates()


class Job:
    """One request as both sides know it."""

    def __init__(self, world: HandoverWorld, name: str, num_tokens: int, first_page: int) -> None:
        self._world = world
        self.num_tokens = num_tokens
        self.num_pages = -(-num_tokens // PAGE)
        pages = list(range(first_page, first_page + self.num_pages))
        self.sent = _request(name, "prefill", D, num_tokens, pages)
        self.received = _request(name, "decode", P, num_tokens, pages[::-1])
        world.prefill_store.fill(self.sent.page_ids, name)

    @property
    def key(self) -> OwnerKey:
        return self.sent.key

    def begin(self) -> None:
        self._world.sender.begin(self.sent)

    def launch(self, num_tokens: int, rates: SendRates = NOT_MEASURED) -> LayerWatch | None:
        """The prefill side launches a step that computes tokens up to the first `num_tokens`; over a slow
        link each layer is a group of its own."""
        start = self.sent.num_computed_tokens
        self.sent.num_computed_tokens = num_tokens
        row = Row(self.sent, start, num_tokens - start, num_tokens == self.num_tokens, False)
        return self._world.sender.watch([row], rates=rates)

    def retract(self, first_page: int) -> None:
        """The prefill side takes the pages away; when it computes the prompt again, it is in others."""
        self.sent.num_computed_tokens = 0
        self.sent.page_ids = list(range(first_page, first_page + self.num_pages))
        self._world.prefill_store.fill(self.sent.page_ids, self.sent.request_id)

    def compute(self, num_tokens: int) -> None:
        """The device has computed the first `num_tokens` tokens."""
        if num_tokens > self.sent.num_computed_tokens:
            watch = self.launch(num_tokens)
            if watch is not None:
                watch.all_at(DONE)

    def make_token(self, token_id: int = 7) -> None:
        self.compute(self.num_tokens)
        self._world.sender.tokens_made(self.sent, [token_id])

    def reserve(self, num_held_pages: int = 0) -> None:
        """The decode side has pages, the first of them from its tree."""
        self.received.num_tree_pages = num_held_pages
        self._world.decode_store.fill(self.received.page_ids[:num_held_pages], "held")
        self._world.note_received(self._world.receiver.reserved(self.received))

    def drop_sent(self, code: str = "aborted") -> None:
        self._world.sender.drop(self.key, code)

    def drop_received(self, code: str = "aborted") -> None:
        self._world.receiver.drop(self.received, code)

    @property
    def kv_arrived(self) -> bool:
        """Whether the pages that decode lacked equal the prefill side's, and the held ones are untouched."""
        held = self.received.num_tree_pages
        new = self._world.decode_store.content(self.received.page_ids[held:])
        kept = FakePageStore()
        kept.fill(self.received.page_ids[:held], "held")
        return new == self._world.prefill_store.content(
            self.sent.page_ids[held:]
        ) and self._world.decode_store.content(self.received.page_ids[:held]) == kept.content(
            self.received.page_ids[:held]
        )


class HandoverWorld:
    """`sent` and `failed` say how each hand-over ended on the prefill and on the decode side: `sent` None is
    well. `admitted` holds the tokens that came with the last page."""

    def __init__(self, wire: Wire | None = None) -> None:
        self.wire = wire or Wire()
        self.now_s = 1000.0
        self.prefill_store = FakePageStore()
        self.decode_store = FakePageStore()
        self.sender = HandoverSender(
            self.wire.prefill, self.prefill_store, PAGE, timeout_s=TIMEOUT_S, clock=lambda: self.now_s
        )
        self.receiver = HandoverReceiver(
            self.wire.decode, self.decode_store, timeout_s=TIMEOUT_S, clock=lambda: self.now_s
        )
        self.wire.clock = lambda: self.now_s
        self.wire.deliver_to_prefill = self._take_at_prefill
        self.wire.deliver_to_decode = self._take_at_decode
        self.sent: dict[OwnerKey, ErrorInfo | None] = {}
        self.failed: dict[OwnerKey, ErrorInfo] = {}
        self.admitted: dict[OwnerKey, list[int]] = {}
        self._num_pages = 0

    def job(self, name: str = "r", num_tokens: int = 10) -> Job:
        job = Job(self, name, num_tokens, self._num_pages)
        self._num_pages += job.num_pages
        return job

    def pump(self) -> None:
        for ended in self.sender.pump():
            self.note_sent(ended)

    def poll(self) -> None:
        """The decode side looks what its device has done."""
        arrived, failed = self.receiver.poll()
        self.receiver.tell_admitted()
        for ended in failed:
            self.note_received(ended)
        for request, token_ids in arrived:
            assert request.key not in self.failed.keys() | self.admitted.keys()
            self.admitted[request.key] = token_ids

    def run(self) -> None:
        """Pumps and passes messages until nothing moves any more."""
        self.pump()
        while self.wire.to_decode or self.wire.to_prefill:
            self.wire.pass_all()
            self.pump()

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.pump()
        for ended in self.receiver.expired():
            self.note_received(ended)

    def note_sent(self, ended: Ended | None) -> None:
        if ended is not None:
            assert ended.key not in self.sent, "ended twice on the prefill side"
            self.sent[ended.key] = ended.error

    def note_received(self, ended: Ended | None) -> None:
        if ended is not None:
            assert ended.key not in self.failed.keys() | self.admitted.keys(), (
                "ended twice on the decode side"
            )
            assert ended.error is not None
            self.failed[ended.key] = ended.error

    def _take_at_prefill(self, event: TransferEvent) -> None:
        match event:
            case ReadyReceived(peer, message):
                self.sender.on_ready(peer, message)
            case CancelReceived(peer, _, cancel):
                self.note_sent(self.sender.on_cancel(peer, (cancel.request_id, cancel.attempt)))
            case ChannelLost(peer, _, error):
                for ended in self.sender.on_lost(peer, error):
                    self.note_sent(ended)
            case AdmittedReceived(_, admitted, at_s):
                self.sender.on_admitted((admitted.request_id, admitted.attempt), at_s)
            case SlotAvailable():
                self.sender.on_slot()
            case ChannelOpened():
                pass
            case _:
                raise AssertionError(event)

    def _take_at_decode(self, event: TransferEvent) -> None:
        match event:
            case PieceReceived():
                self.note_received(self.receiver.on_piece(event))
                self.poll()
            case LastReceived(peer, last):
                self.note_received(self.receiver.on_last(peer, last))
                self.poll()
            case CancelReceived(peer, _, cancel):
                self.note_received(self.receiver.on_cancel(peer, cancel))
            case ChannelLost(peer, _, error):
                for ended in self.receiver.on_lost(peer, error):
                    self.note_received(ended)
            case ChannelOpened(peer, _):
                self.receiver.on_opened(peer)
            case _:
                raise AssertionError(event)


def assert_handed_over(world: HandoverWorld, job: Job, token_id: int = 7) -> None:
    assert world.sent[job.key] is None
    assert world.admitted[job.key] == [token_id]
    assert job.kv_arrived
    assert_settled(world)


def assert_settled(world: HandoverWorld) -> None:
    """No plan is left and every staging slot is free again."""
    assert not world.sender.active and not world.receiver.active and not world.receiver.is_moving
    assert not world.wire.to_decode and not world.wire.to_prefill and not world.wire.unreleased
    assert world.wire.num_free_slots == world.wire.num_slots


def error_of(info: ErrorInfo | None) -> tuple[str, bool]:
    """Code and whether another try may succeed."""
    assert info is not None
    return info.code, info.retryable


def _request(name: str, phase: Phase, peer: PeerRef, num_tokens: int, page_ids: list[int]) -> Request:
    submit = Submit(
        request_id=name,
        attempt=1,
        epoch=1,
        phase=phase,
        token_ids=list(range(num_tokens)),
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(max_tokens=9),
        peer=peer,
    )
    request = Request(submit, gateway=0, order=0, eos_token_ids=(), context_length=1000, now_s=0.0)
    request.page_ids = page_ids
    return request

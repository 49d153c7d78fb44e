"""Hand-overs of paged KV without a model: the product's own sender, receiver, page store and channel.

The prefill side's pages hold random bytes and count as computed; the page tables are random permutations, so
that a request's pages lie scattered over the pool, as they do after hours of serving.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch

from phloem.shared.engine.handover import Ended
from phloem.shared.engine.handover_receive import HandoverReceiver
from phloem.shared.engine.handover_send import HandoverSender
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.page_store import page_store
from phloem.shared.engine.prompt_queue import PromptQueue
from phloem.shared.engine.requests import Request
from phloem.shared.engine.step_plan import Row
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import PeerRef, Phase, SamplingParams, Submit
from phloem.shared.transfer.config import TransferConfig
from phloem.shared.transfer.endpoint import TransferEndpoint
from phloem.shared.transfer.events import (
    CancelReceived,
    ChannelLost,
    ChannelOpened,
    LastReceived,
    PieceReceived,
    ReadyReceived,
    TransferEvent,
)
from phloem.shared.transfer.pending import DONE
from phloem.shared.transfer_bench.rank_protocol import KvShape, PagesRun

PREFILL, DECODE = PeerRef("bench-prefill", 1), PeerRef("bench-decode", 1)
_TOKEN = 7
_LOOK_S = 0.000_05  # between two looks, as an engine does
_IDLE_S = 0.01  # when only an event can change anything


class PagedSide:
    """What both sides share: pages, requests, the endpoint and its events."""

    phase: Phase

    def __init__(self, config: TransferConfig, shape: KvShape, pool_pages: int) -> None:
        """Raises `PhloemError` when the endpoint can't listen."""
        self._timeout_s = config.timeout_s
        self._page_size = shape.page_size
        self.device = torch.device(config.device)
        self.kv = _allocate(shape, pool_pages, self.device)
        self.store = page_store(self.kv, self.device)
        self.events: PromptQueue[TransferEvent] = PromptQueue()
        self.endpoint = TransferEndpoint(config, self.events.put)
        generator = torch.Generator().manual_seed(1 + len(self.phase))
        self._page_table = torch.randperm(pool_pages, generator=generator).tolist()
        self._num_made = 0
        self._used_pages: list[int] = []

    def run(self, work: PagesRun) -> list[float]:
        """When each request began to move or was there, in monotonic seconds; one for all with `ahead`."""
        self._used_pages = []
        if work.ahead:
            requests = [self._request(work.num_pages, index) for index in range(work.count)]
            return [self._turn(requests)]
        return [self._turn([self._request(work.num_pages, 0)]) for _ in range(work.count)]

    def content(self) -> list[int]:
        """Weighted sums of the last run's pages, in order, K of all layers and then V: other arithmetic than
        the digest's."""
        ids = torch.tensor(self._used_pages, device=self.device)
        return [_sum_of(plane[ids]) for plane in (*self.kv.k, *self.kv.v)]

    def close(self) -> None:
        self.endpoint.close(0.0)

    def next_event(self, deadline: float, wait_s: float = _IDLE_S) -> TransferEvent | None:
        """An event, or None after `wait_s`. Raises `PhloemError` past `deadline`, and when the channel is
        lost."""
        if time.monotonic() > deadline:
            raise PhloemError("bench_timeout", f"no hand-over within {self._timeout_s:.0f} s")
        event = self.events.get(wait_s)
        if isinstance(event, ChannelLost | CancelReceived):
            raise PhloemError("bench_failed", f"the transfer broke: {event}")
        return event

    def wait_open(self) -> None:
        """Raises `PhloemError` when the channel does not open in time."""
        deadline = self._deadline()
        while not isinstance(self.next_event(deadline), ChannelOpened):
            pass

    def _turn(self, requests: list[Request]) -> float:
        raise NotImplementedError

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout_s

    def _request(self, num_pages: int, index: int) -> Request:
        """The `index`-th of those that hold pages at a time; its whole prompt is pages to hand over."""
        self._num_made += 1
        num_tokens = num_pages * self._page_size
        submit = Submit(
            request_id=f"bench-{self._num_made}",
            attempt=1,
            epoch=1,
            phase=self.phase,
            token_ids=[_TOKEN] * num_tokens,
            num_prompt_tokens=num_tokens,
            sampling=SamplingParams(max_tokens=2),
            peer=DECODE if self.phase == "prefill" else PREFILL,
        )
        request = Request(
            submit,
            gateway=0,
            order=0,
            eos_token_ids=(),
            context_length=num_tokens + 2,
            now_s=time.monotonic(),
        )
        request.page_ids = self._page_table[index * num_pages : (index + 1) * num_pages]
        self._used_pages += request.page_ids
        return request


class SendingSide(PagedSide):
    """The clock starts when decode's go-ahead is there; the prompts are computed by then."""

    phase = "prefill"

    def __init__(self, config: TransferConfig, shape: KvShape, pool_pages: int) -> None:
        super().__init__(config, shape, pool_pages)
        _fill(self.kv)
        self._sender = HandoverSender(
            self.endpoint, self.store, self._page_size, timeout_s=self._timeout_s, clock=time.monotonic
        )
        self._readies: deque[ReadyReceived] = deque()

    def _turn(self, requests: list[Request]) -> float:
        deadline = self._deadline()
        for request in requests:
            self._sender.begin(request)
            self._count_as_computed(request)
        while len(self._readies) < len(requests):
            _check(self._sender.pump())  # nothing may go yet
            self._stash(self.next_event(deadline, _LOOK_S if self._sender.expects_ready else _IDLE_S))
        began_s = time.monotonic()
        for _ in requests:
            ready = self._readies.popleft()
            self._sender.on_ready(ready.peer, ready.message)
        done = _check(self._sender.pump())
        while done < len(requests):
            event = self.next_event(deadline)
            self._stash(event)
            if event is not None:  # a slot: nothing else is waited for
                done += _check(self._sender.pump())
        return began_s

    def _count_as_computed(self, request: Request) -> None:
        """As if a step had computed the whole prompt, all layers at once, and made token 0."""
        num_tokens = request.num_computed_tokens = request.num_prompt_tokens
        row = Row(request, 0, num_tokens, samples=True, from_device=False)
        watch = self._sender.watch([row])
        assert watch is not None
        watch.reached(self.store.num_layers, DONE)
        self._sender.tokens_made(request, [_TOKEN])

    def _stash(self, event: TransferEvent | None) -> None:
        """Keeps the go-ahead of a later turn; other events only say that pumping is worth while."""
        if isinstance(event, ReadyReceived):
            self._readies.append(event)


class ReceivingSide(PagedSide):
    """The clock stops when the last page is in its place and checked."""

    phase = "decode"

    def __init__(self, config: TransferConfig, shape: KvShape, pool_pages: int) -> None:
        super().__init__(config, shape, pool_pages)
        self._receiver = HandoverReceiver(
            self.endpoint, self.store, timeout_s=self._timeout_s, clock=time.monotonic
        )

    def _turn(self, requests: list[Request]) -> float:
        deadline = self._deadline()
        for request in requests:
            _check([self._receiver.reserved(request)])
        num_last = num_admitted = 0
        while num_last < len(requests):
            num_last += self._take(self.next_event(deadline))
            num_admitted += self._admit()
        while (num_admitted := num_admitted + self._admit()) < len(requests):
            self._take(self.next_event(deadline, self._receiver.next_look_s))  # as an engine does
        there_s = time.monotonic()
        self._receiver.tell_admitted()
        return there_s

    def _admit(self) -> int:
        """How many requests are there by now."""
        if not self._receiver.has_news:
            return 0
        arrived, failed = self._receiver.poll()
        _check(failed)
        return len(arrived)

    def _take(self, event: TransferEvent | None) -> bool:
        """Whether it was the last of a request."""
        match event:
            case PieceReceived():
                _check([self._receiver.on_piece(event)])
            case LastReceived(peer, last):
                _check([self._receiver.on_last(peer, last)])
                return True
            case _:
                pass
        return False


def _check(ended: Sequence[Ended | None]) -> int:
    """How many ended well. Raises `PhloemError` for one that did not."""
    over = [item for item in ended if item is not None]
    for item in over:
        if item.error is not None:
            raise PhloemError.from_info(item.error)
    return len(over)


def _allocate(shape: KvShape, pool_pages: int, device: torch.device) -> KVCache:
    dtype: torch.dtype = getattr(torch, shape.dtype)
    size = (pool_pages, shape.page_size, shape.num_kv_heads, shape.head_dim)
    k, v = ([torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.num_layers)] for _ in "kv")
    return KVCache(k, v)


def _fill(kv: KVCache) -> None:
    for seed, plane in enumerate((*kv.k, *kv.v)):
        generator = torch.Generator(plane.device).manual_seed(seed)
        words = plane.view(torch.int16)
        torch.randint(-(2**15), 2**15, words.shape, generator=generator, out=words)


def _sum_of(pages: torch.Tensor) -> int:
    words = pages.contiguous().view(-1).view(torch.int32).to(torch.int64)
    weights = torch.arange(1, words.numel() + 1, device=words.device, dtype=torch.int64)
    return int((words * weights).sum())

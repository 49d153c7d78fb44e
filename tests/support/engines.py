"""Real engines in threads of the test process, which share one loaded decoder: its weights are read-only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from phloem.shared.block_hash import BlockHasher
from phloem.shared.engine.engine_loop import Engine
from phloem.shared.engine.engine_parts import EngineParts
from phloem.shared.engine.kv_pool import KVPool
from phloem.shared.engine.limits import Limits
from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.page_account import PageAccount
from phloem.shared.engine.page_store import KVPageStore
from phloem.shared.engine.radix_tree import RadixTree
from phloem.shared.engine.step_runner import SyncStepRunner
from phloem.shared.engine.weights.loader import load_decoder
from phloem.shared.protocol.cluster import Role
from phloem.shared.protocol.engine import (
    AuditReply,
    AuditRequest,
    EngineAbort,
    EngineSubmit,
    EngineUp,
    FlushCache,
    PeerUp,
    Reply,
    StepReport,
    Stop,
)
from phloem.shared.protocol.session import PeerRef, Phase, SamplingParams, Submit
from phloem.shared.transfer.config import TransferConfig
from phloem.shared.transfer.endpoint import TransferEndpoint
from phloem.shared.transfer.events import TransferEvent
from phloem.shared.transfer.stats import SendRates
from tests.support.streams import Stream

CPU = torch.device("cpu")
SECRET = b"tests/support/engines"
DEADLINE_S = 120.0  # of any wait here: a hang fails, a slow machine does not
_LOOK_S = 0.02  # a wait looks at its condition this often though nothing was said


def load_float32(model_dir: Path) -> Decoder:
    return load_decoder(
        model_dir, load_format="auto", dtype=torch.float32, device=CPU, progress=lambda done, total: None
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes in the caller's thread only: the engines of a test run at the same time, each in its
    own, and would fight over the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """How one engine differs from the others of a test."""

    role: Role = "unified"
    num_pages: int = 512
    page_size: int = 16
    chunk_tokens: int = 2048
    max_slots: int = 64
    staging_bytes: int = 4 * 1024 * 1024
    eos_token_ids: tuple[int, ...] = ()
    overlap: bool = True
    transfer_bytes_per_s: float = 1e6  # as if measured: so slow that each layer's KV is sent by itself


class LocalEngine:
    """An engine with its own KV pool and transfer endpoint, running in a thread; a context manager."""

    def __init__(self, name: str, decoder: Decoder, spec: EngineSpec) -> None:
        self.ref = PeerRef(name, 1)
        self.spec = spec
        self._changed = threading.Condition()
        self._streams: dict[str, Stream] = {}
        self._replies: dict[int, AuditReply | Reply] = {}
        self._num_tags = 0
        self._failure: BaseException | None = None
        self.endpoint = TransferEndpoint(self._transfer_config(decoder), self._deliver)
        self._engine = Engine(self._parts(decoder))
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}")
        self._thread.start()

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops, and waits for every thread."""
        self._engine.deliver(Stop())
        self._thread.join(DEADLINE_S)
        self.endpoint.close()
        assert not self._thread.is_alive(), f"engine {self.ref.worker_id} does not stop"
        self._raise_failure()

    # -- requests --------------------------------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        phase: Phase = "both",
        peer: PeerRef | None = None,
        num_prompt_tokens: int | None = None,
        salt: str = "",
    ) -> None:
        num_prompt_tokens = len(token_ids) if num_prompt_tokens is None else num_prompt_tokens
        first_index = len(token_ids) - num_prompt_tokens + (phase == "decode")
        with self._changed:
            assert request_id not in self._streams, f"{request_id} is used twice"
            self._streams[request_id] = Stream(first_index)
        submit = Submit(
            request_id=request_id,
            attempt=1,
            epoch=1,
            phase=phase,
            token_ids=list(token_ids),
            num_prompt_tokens=num_prompt_tokens,
            sampling=sampling,
            peer=peer,
            block_hashes=BlockHasher(SECRET).chain(token_ids, salt),
            cache_salt=salt,
        )
        self._engine.deliver(EngineSubmit(0, submit))

    def abort(self, request_id: str) -> None:
        self._engine.deliver(EngineAbort(request_id, 1))

    def stream(self, request_id: str) -> Stream:
        return self._streams[request_id]

    def wait_end(self, request_id: str) -> Stream:
        """The request's outputs once it has ended; how it ended is the caller's to judge."""
        self.wait(lambda: self._streams[request_id].ended is not None, f"{request_id} to end")
        return self._streams[request_id]

    def wait(self, condition: Callable[[], object], what: str, timeout_s: float = DEADLINE_S) -> None:
        """Until `condition` holds; it is looked at whenever the engine says something."""
        deadline = time.monotonic() + timeout_s
        while not condition():  # without our lock: the endpoint holds its own when it tells us something
            self._raise_failure()
            assert time.monotonic() < deadline, f"{self.ref.worker_id}: waited {timeout_s} s for {what}"
            with self._changed:
                self._changed.wait(_LOOK_S)

    # -- the whole engine ------------------------------------------------------------------------------

    def connect(self, decode: LocalEngine) -> None:
        """Opens the KV channel to a decode engine; returns when both sides have it open."""
        self._engine.deliver(PeerUp(decode.ref, decode.endpoint.address))
        self.wait(lambda: self.endpoint.is_open(decode.ref, "prefill"), "the channel")
        decode.wait(lambda: decode.endpoint.is_open(self.ref, "decode"), "the channel")

    def audit(self) -> AuditReply:
        reply = self._ask(lambda tag: self._engine.deliver(AuditRequest(tag)))
        assert isinstance(reply, AuditReply)
        return reply

    def audit_idle(self) -> AuditReply:
        """The audit of an engine without requests: clean, and every page free or in the tree."""
        deadline = time.monotonic() + DEADLINE_S
        while (reply := self.audit()).num_requests:
            assert time.monotonic() < deadline, f"{reply.num_requests} requests are left"
        assert reply.problems == []
        assert reply.locked_nodes == reply.request_pages == 0
        assert reply.free_pages + reply.tree_pages == reply.total_pages
        return reply

    def flush(self) -> None:
        """Forgets every cached prefix."""
        self._ask(lambda tag: self._engine.deliver(FlushCache(tag)))

    def _ask(self, send: Callable[[int], None]) -> AuditReply | Reply:
        self._num_tags += 1
        tag = self._num_tags
        send(tag)
        self.wait(lambda: tag in self._replies, "a reply")
        return self._replies.pop(tag)

    # -- inside ----------------------------------------------------------------------------------------

    def _parts(self, decoder: Decoder) -> EngineParts:
        spec = self.spec
        kv = KVCache.allocate(decoder.config, spec.num_pages, spec.page_size, decoder.dtype, CPU)
        length = min(decoder.config.context_length, spec.num_pages * spec.page_size)
        max_pages = -(-length // spec.page_size)
        tree = RadixTree(spec.page_size)
        return EngineParts(
            limits=Limits(spec.chunk_tokens, spec.max_slots, 1024),
            account=PageAccount(KVPool(spec.num_pages), tree, BlockHasher(SECRET)),
            runner=SyncStepRunner(decoder, kv, CPU, num_slots=spec.max_slots, max_pages=max_pages),
            channels=self.endpoint,
            store=KVPageStore(kv),
            send=self._take,
            dials_peers=spec.role != "decode",
            eos_token_ids=spec.eos_token_ids,
            context_length=length,
            handover_timeout_s=DEADLINE_S,
            overlap=spec.overlap,
            send_rates=lambda: SendRates(spec.transfer_bytes_per_s),
        )

    def _transfer_config(self, decoder: Decoder) -> TransferConfig:
        return TransferConfig(
            me=self.ref,
            host="127.0.0.1",
            cluster_secret=SECRET,
            kv_layout=f"{decoder.config.num_layers} layers, pages of {self.spec.page_size}",
            staging_bytes=self.spec.staging_bytes,
            accepts=self.spec.role != "prefill",
        )

    def _run(self) -> None:
        try:
            self._engine.run()
        except BaseException as error:  # it is raised again in the test's thread
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise AssertionError(f"engine {self.ref.worker_id} failed") from self._failure

    def _deliver(self, event: TransferEvent) -> None:
        self._engine.deliver(event)
        with self._changed:
            self._changed.notify_all()

    def _take(self, message: EngineUp) -> None:
        with self._changed:
            match message:
                case StepReport():
                    for outputs in message.outputs:
                        for output in outputs.outputs:
                            self._streams[output.request_id].take(output)
                case AuditReply() | Reply():
                    self._replies[message.tag] = message
                case _:
                    raise AssertionError(f"unexpected {message}")
            self._changed.notify_all()


def engine_threads() -> list[str]:
    """Names of the living threads that belong to engines or their endpoints."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("engine-", "phloem-transfer"))]

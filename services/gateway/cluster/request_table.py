"""All requests under way, by id and by worker; brings each event to the request that it belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from phloem.services.gateway.cluster.delivery import Delivery
from phloem.services.gateway.cluster.live_request import LiveRequest
from phloem.services.gateway.cluster.worker_session import WorkerSession
from phloem.shared.errors import PhloemError, invalid_request
from phloem.shared.protocol.session import PeerRef, StepMessage, Submit, TokensOut


class RequestTable:
    """Knows which workers hold something of which request. When an attempt is decided, the workers that still
    hold something of it are told to abort, at once and not when the consumer looks."""

    def __init__(self, session_of: Callable[[PeerRef], WorkerSession | None]) -> None:
        self._session_of = session_of
        self._requests: dict[str, LiveRequest] = {}
        self._by_worker: dict[PeerRef, dict[str, LiveRequest]] = {}
        self._prefilling: Counter[PeerRef] = Counter()
        # Since the worker last told its load: our requests there, and the tokens that each has it compute.
        self._new: dict[PeerRef, dict[str, int]] = {}
        self._delivery = Delivery()

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left anywhere."""
        return not self._requests and not self._by_worker and not self._prefilling

    def num_requests(self, worker: PeerRef) -> int:
        """Requests of ours that the worker holds."""
        return len(self._by_worker.get(worker, ()))

    def prefill_tokens(self, worker: PeerRef) -> int:
        """Prompt tokens of ours that the worker has not computed yet, as far as we know."""
        return self._prefilling.get(worker, 0)

    def new_requests(self, worker: PeerRef) -> int:
        """Requests of ours that went there since we last heard of its load."""
        return len(self._new.get(worker, ()))

    def new_prefill_tokens(self, worker: PeerRef) -> int:
        """Prompt tokens of those that the worker has not computed yet."""
        return sum(self._new.get(worker, {}).values())

    def on_load(self, worker: PeerRef) -> None:
        """The worker's load is news, and knows of what we sent before."""
        self._new.pop(worker, None)

    def add(self, live: LiveRequest) -> None:
        """From now on outputs for its id go to it. Raises `PhloemError` (400, `duplicate_request`)."""
        request_id = live.state.request.request_id
        if request_id in self._requests:
            raise invalid_request(f"request id {request_id!r} is in use", code="duplicate_request")
        self._requests[request_id] = live

    def remove(self, live: LiveRequest) -> None:
        """The request is over: whoever still holds something of it aborts."""
        live.close()
        self._release(live)
        del self._requests[live.state.request.request_id]

    def submit(
        self, live: LiveRequest, submits: dict[PeerRef, Submit], prefilling: tuple[PeerRef, int]
    ) -> None:
        """Sends one attempt's submissions. One that can't be sent fails the attempt like a lost worker."""
        live.prefilling = prefilling
        self._prefilling[prefilling[0]] += prefilling[1]
        for worker, submit in submits.items():
            session = self._session_of(worker)
            try:
                if session is None:
                    raise PhloemError("worker_lost", f"worker {worker.worker_id} has left", retryable=True)
                session.submit(submit)
            except PhloemError as error:
                live.state.on_lost(worker, error.info)
                break
            self._by_worker.setdefault(worker, {})[submit.request_id] = live
            num_tokens = prefilling[1] if worker == prefilling[0] else 0
            self._new.setdefault(worker, {})[submit.request_id] = num_tokens
        self.settle(live)

    def on_step(self, worker: PeerRef, message: StepMessage) -> None:
        """One engine step's outputs for this gateway."""
        progressed: dict[LiveRequest, None] = {}
        ended: list[LiveRequest] = []
        for output in message.outputs:
            live = self._requests.get(output.request_id)
            if live is None:
                continue  # it ended here before the worker knew
            if isinstance(output, TokensOut):
                live.state.on_tokens(worker, output)
                progressed[live] = None
            else:
                live.state.on_ended(worker, output)
                ended.append(live)
        # Not before all outputs are taken in: the end of a worker's part may be behind its last tokens.
        for live in ended:
            self._forget_ended(live)
            progressed[live] = None
        for live in progressed:
            self._follow(live)

    def on_lost(self, worker: PeerRef, error: PhloemError) -> None:
        """The session with `worker` broke."""
        self.on_load(worker)
        for live in list(self._by_worker.get(worker, {}).values()):
            live.state.on_lost(worker, error.info)
            self.settle(live)

    def settle(self, live: LiveRequest) -> None:
        """Follows what the last event made of the request, and lets its consumer know."""
        self._forget_ended(live)
        self._follow(live)

    def _follow(self, live: LiveRequest) -> None:
        state = live.state
        decided = state.decided
        if live.prefilling is not None and (state.emitted or decided):
            self._prefilled(live)
        if decided:
            self._release(live)
        self._delivery.add(live)

    def _forget_ended(self, live: LiveRequest) -> None:
        state = live.state
        for worker, leg in state.legs.items():
            if leg.over:
                self._forget(worker, state.request.request_id)

    def _release(self, live: LiveRequest) -> None:
        state = live.state
        request_id = state.request.request_id
        for worker in state.open_workers:
            session = self._session_of(worker)
            if self._forget(worker, request_id) and session is not None:
                session.abort(request_id, state.attempt)
        self._prefilled(live)

    def _forget(self, worker: PeerRef, request_id: str) -> bool:
        """Whether the worker held the request until now."""
        held = self._by_worker.get(worker, {})
        known = held.pop(request_id, None) is not None
        self._new.get(worker, {}).pop(request_id, None)
        if not held:
            self._by_worker.pop(worker, None)
        return known

    def _prefilled(self, live: LiveRequest) -> None:
        if live.prefilling is None:
            return
        worker, num_tokens = live.prefilling
        live.prefilling = None
        self._prefilling[worker] -= num_tokens
        new = self._new.get(worker, {})
        if live.state.request.request_id in new:
            new[live.state.request.request_id] = 0
        if self._prefilling[worker] <= 0:
            del self._prefilling[worker]

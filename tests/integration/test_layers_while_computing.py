"""Over real channels: the first layers' KV is at the decode side while the prefill side computes the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor

from phloem.shared.engine.models.batch import ForwardBatch
from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.protocol.session import SamplingParams
from phloem.shared.transfer.events import PieceReceived, ReadyReceived, TransferEvent
from tests.support.engine_cluster import running_cluster
from tests.support.engines import EngineSpec, LocalEngine, one_thread
from tests.support.tiny_model import random_prompt, tiny_decoder
from tests.support.transfer import wait_until

SAMPLING = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


class PatientDecoder(Decoder):
    """Computes no further layer before the KV of the one before it has arrived."""

    def __init__(self, decoder: Decoder, log: EventLog) -> None:
        self.__dict__ = dict(decoder.__dict__)
        self._log = log

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        told = batch.on_kv
        if told is None:
            return super().forward(batch, kv)
        wait_until(lambda: self._log.of_type(ReadyReceived), 30.0)

        def on_kv(num_layers: int) -> None:
            told(num_layers)
            if num_layers < len(kv.k):
                wait_until(lambda: len(self._log.of_type(PieceReceived)) >= num_layers, 30.0)

        return super().forward(batch._replace(on_kv=on_kv), kv)


class EventLog:
    def __init__(self) -> None:
        self._events: list[TransferEvent] = []

    def note(self, event: TransferEvent) -> None:
        self._events.append(event)

    def of_type(self, kind: type[PieceReceived] | type[ReadyReceived]) -> list[TransferEvent]:
        return [event for event in self._events if isinstance(event, kind)]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[EventLog]:
    """What the engines' endpoints tell them, once they were told."""
    log, deliver = EventLog(), LocalEngine._deliver

    def deliver_and_note(engine: LocalEngine, event: TransferEvent) -> None:
        deliver(engine, event)
        log.note(event)

    monkeypatch.setattr(LocalEngine, "_deliver", deliver_and_note)
    with one_thread():
        yield log


def test_layers_arrive_before_the_next_ones_are_computed(log: EventLog) -> None:
    decoder = tiny_decoder()
    prompt = random_prompt(70, 3)
    with running_cluster(decoder, 0, 1, spec=EngineSpec()) as alone:
        engine = alone.decode[0]
        engine.submit("alone", prompt, SAMPLING)
        expected = engine.wait_end("alone").token_ids
    with running_cluster(PatientDecoder(decoder, log), spec=EngineSpec()) as cluster:
        cluster.submit("r", prompt, SAMPLING)
        assert cluster.wait_tokens("r") == expected
        assert len(log.of_type(PieceReceived)) == decoder.config.num_layers
        wait_until(lambda: cluster.prefill[0].audit().exposed_transfer_s)  # word of it is on its way

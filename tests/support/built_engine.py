"""The engine as its process builds it from flags, turned by the test's own thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from phloem.shared.engine.assembly import build_engine
from phloem.shared.engine.config import EngineConfig, EngineOptions
from phloem.shared.engine.engine_loop import Engine
from phloem.shared.protocol.engine import EngineReady, EngineSubmit, EngineUp, Progress, StepReport
from phloem.shared.protocol.session import SamplingParams, Submit
from tests.support.streams import Stream

_DEADLINE_S = 600.0  # of any call here: a hang fails, a slow machine does not


class BuiltEngine:
    """Make it with `built_engine`. Requests are submitted, then run to their ends together."""

    def __init__(self) -> None:
        self.progress: list[Progress] = []
        self._engine: Engine | None = None
        self._ready: EngineReady | None = None
        self._streams: dict[str, Stream] = {}

    @property
    def ready(self) -> EngineReady:
        assert self._ready is not None
        return self._ready

    def attach(self, engine: Engine, ready: EngineReady) -> None:
        self._engine, self._ready = engine, ready

    def receive(self, message: EngineUp) -> None:
        match message:
            case Progress():
                self.progress.append(message)
            case StepReport():
                for group in message.outputs:
                    for output in group.outputs:
                        self._streams[output.request_id].take(output)
            case _:
                raise AssertionError(f"unexpected {message}")

    def submit(
        self, request_id: str, token_ids: list[int], num_prompt_tokens: int, sampling: SamplingParams
    ) -> None:
        """As a gateway does; tokens past `num_prompt_tokens` count as generated already."""
        assert self._engine is not None
        self._streams[request_id] = Stream(len(token_ids) - num_prompt_tokens)
        self._engine.deliver(
            EngineSubmit(
                0,
                Submit(
                    request_id=request_id,
                    attempt=1,
                    epoch=1,
                    phase="both",
                    token_ids=token_ids,
                    num_prompt_tokens=num_prompt_tokens,
                    sampling=sampling,
                ),
            )
        )

    def run(self) -> dict[str, Stream]:
        """What was said of each request since the last call, when all have ended."""
        assert self._engine is not None
        deadline = time.monotonic() + _DEADLINE_S
        while any(stream.ended is None for stream in self._streams.values()):
            assert time.monotonic() < deadline, f"requests still run after {_DEADLINE_S} s"
            self._engine.turn()
        done, self._streams = self._streams, {}
        return done


@contextmanager
def built_engine(options: EngineOptions) -> Iterator[BuiltEngine]:
    """A `unified` engine of these flags; `model_path` is a directory."""
    built = BuiltEngine()
    config = EngineConfig(
        worker_id="test", epoch=1, role="unified", host="127.0.0.1", cluster_secret=b"test", options=options
    )
    engine, ready, endpoint = build_engine(config, built.receive)
    try:
        built.attach(engine, ready)
        yield built
    finally:
        engine.close()
        endpoint.close()

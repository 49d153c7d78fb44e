"""The dialect of SGLang's /generate."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from phloem.services.gateway.api.native_types import GenerateAnswer, MetaInfo, NativeFinish
from phloem.services.gateway.api.openai_answers import phloem_field
from phloem.services.gateway.call import Call
from phloem.services.gateway.sequence import RunningSequence, TextDelta


class NativeDialect:
    """Every event holds all text so far, as SGLang's do. `single`: one prompt and n = 1, answered without a
    list."""

    def __init__(self, call: Call, *, single: bool) -> None:
        self._call = call
        self._single = single

    def chunks(self, sequence: RunningSequence, delta: TextDelta) -> list[bytes]:
        return [msgspec.json.encode(self._answer(sequence, in_stream=True))]

    def closing(self, sequences: Sequence[RunningSequence]) -> list[bytes]:
        return []

    def whole(self, sequences: Sequence[RunningSequence]) -> bytes:
        answers = [self._answer(sequence, in_stream=False) for sequence in sequences]
        return msgspec.json.encode(answers[0] if self._single else answers)

    def _answer(self, sequence: RunningSequence, *, in_stream: bool) -> GenerateAnswer:
        finish = _finish_of(sequence)
        meta = MetaInfo(
            id=sequence.request.request_id,
            finish_reason=finish,
            prompt_tokens=len(sequence.request.token_ids),
            completion_tokens=sequence.num_generated_tokens,
            cached_tokens=sequence.num_cached_tokens,
            e2e_latency=time.monotonic() - self._call.received_at if finish is not None else UNSET,
        )
        return GenerateAnswer(
            sequence.text,
            list(sequence.token_ids),
            meta,
            index=sequence.index if in_stream and not self._single else UNSET,
            phloem=phloem_field(self._call, [sequence]) if finish is not None else UNSET,
        )


def _finish_of(sequence: RunningSequence) -> NativeFinish | None:
    if sequence.finish_reason is None:
        return None
    if sequence.finish_reason == "length":
        return NativeFinish("length", length=sequence.num_generated_tokens)
    return NativeFinish("stop", matched=sequence.matched_stop)

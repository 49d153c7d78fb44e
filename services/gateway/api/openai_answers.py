"""The two dialects of OpenAI: chat completions and completions."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

import phloem
from phloem.services.gateway.api.openai_types import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    Completion,
    CompletionChoice,
    PhloemField,
    PromptTokensDetails,
    Usage,
)
from phloem.services.gateway.api.text_event import TEXT, TextEvent
from phloem.services.gateway.call import Call
from phloem.services.gateway.sequence import RunningSequence, TextDelta
from phloem.shared.protocol.session import FinishReason

SYSTEM_FINGERPRINT = f"phloem-{phloem.__version__}"


def usage_of(sequences: Sequence[RunningSequence]) -> Usage:
    """A prompt counts once, however many choices it has; so do its cached tokens, as its first choice found
    them."""
    firsts = {sequence.prompt_index: sequence for sequence in reversed(sequences)}.values()
    num_prompt = sum(len(first.request.token_ids) for first in firsts)
    num_generated = sum(sequence.num_generated_tokens for sequence in sequences)
    num_cached = sum(first.num_cached_tokens for first in firsts)
    return Usage(num_prompt, num_generated, num_prompt + num_generated, PromptTokensDetails(num_cached))


def phloem_field(call: Call, sequences: Sequence[RunningSequence]) -> PhloemField | UnsetType:
    """What the request asked for with its header, if it did."""
    return PhloemField(call.request_id, sequences[0].timeline) if call.wants_timeline else UNSET


class ChatDialect:
    """`/v1/chat/completions`. One per request."""

    def __init__(self, call: Call, model: str, *, include_usage: bool) -> None:
        self._call = call
        self._model = model
        self._include_usage = include_usage
        self._id = "chatcmpl-" + call.request_id.removeprefix("req-")
        self._text_events: dict[int, TextEvent] = {}  # of the choices that have been greeted

    def chunks(self, sequence: RunningSequence, delta: TextDelta) -> list[bytes]:
        if not delta.text and delta.finish_reason is None:
            return []
        text_event = self._text_events.get(sequence.index)
        greeting = []
        if text_event is None:
            greeting = [self._event(sequence, ChatDelta(role="assistant", content=""))]
            text_event = TextEvent(self._event(sequence, ChatDelta(content=TEXT)))
            self._text_events[sequence.index] = text_event
        if delta.finish_reason is None:
            return [*greeting, text_event.of(delta.text)]
        words = ChatDelta(content=delta.text) if delta.text else ChatDelta()
        return [*greeting, self._event(sequence, words, delta.finish_reason)]

    def closing(self, sequences: Sequence[RunningSequence]) -> list[bytes]:
        extra = phloem_field(self._call, sequences)
        if not self._include_usage and extra is UNSET:
            return []
        return [self._chunk([], usage_of(sequences) if self._include_usage else UNSET, extra)]

    def whole(self, sequences: Sequence[RunningSequence]) -> bytes:
        answer = ChatCompletion(
            id=self._id,
            created=self._call.created,
            model=self._model,
            system_fingerprint=SYSTEM_FINGERPRINT,
            choices=[
                ChatChoice(sequence.index, AssistantMessage(sequence.text), sequence.finish_reason)
                for sequence in sequences
            ],
            usage=usage_of(sequences),
            phloem=phloem_field(self._call, sequences),
        )
        return msgspec.json.encode(answer)

    def _event(
        self, sequence: RunningSequence, words: ChatDelta, finish_reason: FinishReason | None = None
    ) -> bytes:
        return self._chunk([ChatChunkChoice(sequence.index, words, finish_reason)])

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | UnsetType = UNSET,
        extra: PhloemField | UnsetType = UNSET,
    ) -> bytes:
        chunk = ChatCompletionChunk(
            id=self._id,
            created=self._call.created,
            model=self._model,
            system_fingerprint=SYSTEM_FINGERPRINT,
            choices=choices,
            usage=None if usage is UNSET and self._include_usage else usage,
            phloem=extra,
        )
        return msgspec.json.encode(chunk)


class CompletionDialect:
    """`/v1/completions`. One per request."""

    def __init__(self, call: Call, model: str, *, include_usage: bool) -> None:
        self._call = call
        self._model = model
        self._include_usage = include_usage
        self._id = "cmpl-" + call.request_id.removeprefix("req-")
        self._text_events: dict[int, TextEvent] = {}

    def chunks(self, sequence: RunningSequence, delta: TextDelta) -> list[bytes]:
        if delta.finish_reason is not None:
            return [self._event(sequence, delta.text, delta.finish_reason)]
        if not delta.text:
            return []
        text_event = self._text_events.get(sequence.index)
        if text_event is None:
            text_event = self._text_events[sequence.index] = TextEvent(self._event(sequence, TEXT, None))
        return [text_event.of(delta.text)]

    def closing(self, sequences: Sequence[RunningSequence]) -> list[bytes]:
        extra = phloem_field(self._call, sequences)
        if not self._include_usage and extra is UNSET:
            return []
        return [self._answer([], usage_of(sequences) if self._include_usage else UNSET, extra)]

    def whole(self, sequences: Sequence[RunningSequence]) -> bytes:
        choices = [
            CompletionChoice(sequence.index, sequence.text, sequence.finish_reason) for sequence in sequences
        ]
        return self._answer(choices, usage_of(sequences), phloem_field(self._call, sequences))

    def _event(self, sequence: RunningSequence, text: str, finish_reason: FinishReason | None) -> bytes:
        choice = CompletionChoice(sequence.index, text, finish_reason)
        return self._answer([choice], None if self._include_usage else UNSET)

    def _answer(
        self,
        choices: list[CompletionChoice],
        usage: Usage | UnsetType | None,
        extra: PhloemField | UnsetType = UNSET,
    ) -> bytes:
        answer = Completion(
            id=self._id,
            created=self._call.created,
            model=self._model,
            system_fingerprint=SYSTEM_FINGERPRINT,
            choices=choices,
            usage=usage,
            phloem=extra,
        )
        return msgspec.json.encode(answer)

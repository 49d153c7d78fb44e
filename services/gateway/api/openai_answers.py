"""The two dialects of OpenAI: chat completions and completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

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
    GenerationFields,
    PhloemField,
    PromptTokensDetails,
    Usage,
)
from phloem.services.gateway.api.text_event import TEXT, TextEvent
from phloem.services.gateway.call import Call
from phloem.services.gateway.sequence import RunningSequence, TextDelta
from phloem.shared.protocol.session import FinishReason

SYSTEM_FINGERPRINT = f"phloem-{phloem.__version__}"


# Chunks of a stream that tell the usage: none of them, one more at the end, or every one and one more.
UsageWish: TypeAlias = Literal["none", "last", "every"]


def usage_wish(body: GenerationFields) -> UsageWish:
    """What `stream_options` ask for; as in vLLM, `continuous_usage_stats` means nothing by itself."""
    options = body.stream_options
    if options is None or not options.include_usage:
        return "none"
    return "every" if options.continuous_usage_stats else "last"


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


class _Dialect:
    """What both have in common; `usage` says which chunks tell the usage."""

    def __init__(self, call: Call, model: str, *, usage: UsageWish) -> None:
        self._call = call
        self._model = model
        self._usage = usage
        self._text_events: dict[int, TextEvent] = {}  # of the choices that have begun

    def _usage_so_far(self, sequence: RunningSequence) -> Usage | UnsetType | None:
        """In the chunks of a choice: its own, or null until the last chunk tells of all."""
        if self._usage == "every":
            return usage_of([sequence])
        return None if self._usage == "last" else UNSET

    def _usage_at_end(self, sequences: Sequence[RunningSequence]) -> Usage | UnsetType:
        return UNSET if self._usage == "none" else usage_of(sequences)


class ChatDialect(_Dialect):
    """`/v1/chat/completions`. One per request."""

    def chunks(self, sequence: RunningSequence, delta: TextDelta) -> list[bytes]:
        if not delta.text and delta.finish_reason is None:
            return []
        greeting = []
        if sequence.index not in self._text_events:
            greeting = [self._event(sequence, ChatDelta(role="assistant", content=""))]
            template = self._event(sequence, ChatDelta(content=TEXT))
            self._text_events[sequence.index] = TextEvent(template)
        if delta.finish_reason is None and self._usage != "every":
            return [*greeting, self._text_events[sequence.index].of(delta.text)]
        words = ChatDelta(content=delta.text) if delta.text else ChatDelta()
        return [*greeting, self._event(sequence, words, delta.finish_reason)]

    def closing(self, sequences: Sequence[RunningSequence]) -> list[bytes]:
        usage, extra = self._usage_at_end(sequences), phloem_field(self._call, sequences)
        return [] if usage is UNSET and extra is UNSET else [self._chunk([], usage, extra)]

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

    @property
    def _id(self) -> str:
        return "chatcmpl-" + self._call.request_id.removeprefix("req-")

    def _event(
        self, sequence: RunningSequence, words: ChatDelta, finish_reason: FinishReason | None = None
    ) -> bytes:
        choice = ChatChunkChoice(sequence.index, words, finish_reason)
        return self._chunk([choice], self._usage_so_far(sequence))

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | UnsetType | None,
        extra: PhloemField | UnsetType = UNSET,
    ) -> bytes:
        chunk = ChatCompletionChunk(
            id=self._id,
            created=self._call.created,
            model=self._model,
            system_fingerprint=SYSTEM_FINGERPRINT,
            choices=choices,
            usage=usage,
            phloem=extra,
        )
        return msgspec.json.encode(chunk)


class CompletionDialect(_Dialect):
    """`/v1/completions`. One per request."""

    def chunks(self, sequence: RunningSequence, delta: TextDelta) -> list[bytes]:
        if delta.finish_reason is not None or (delta.text and self._usage == "every"):
            return [self._event(sequence, delta.text, delta.finish_reason)]
        if not delta.text:
            return []
        if sequence.index not in self._text_events:
            self._text_events[sequence.index] = TextEvent(self._event(sequence, TEXT, None))
        return [self._text_events[sequence.index].of(delta.text)]

    def closing(self, sequences: Sequence[RunningSequence]) -> list[bytes]:
        usage, extra = self._usage_at_end(sequences), phloem_field(self._call, sequences)
        return [] if usage is UNSET and extra is UNSET else [self._answer([], usage, extra)]

    def whole(self, sequences: Sequence[RunningSequence]) -> bytes:
        choices = [
            CompletionChoice(sequence.index, sequence.text, sequence.finish_reason) for sequence in sequences
        ]
        return self._answer(choices, usage_of(sequences), phloem_field(self._call, sequences))

    def _event(self, sequence: RunningSequence, text: str, finish_reason: FinishReason | None) -> bytes:
        choice = CompletionChoice(sequence.index, text, finish_reason)
        return self._answer([choice], self._usage_so_far(sequence))

    def _answer(
        self,
        choices: list[CompletionChoice],
        usage: Usage | UnsetType | None,
        extra: PhloemField | UnsetType = UNSET,
    ) -> bytes:
        answer = Completion(
            id="cmpl-" + self._call.request_id.removeprefix("req-"),
            created=self._call.created,
            model=self._model,
            system_fingerprint=SYSTEM_FINGERPRINT,
            choices=choices,
            usage=usage,
            phloem=extra,
        )
        return msgspec.json.encode(answer)

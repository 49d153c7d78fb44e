"""OpenAI's request and response bodies, as far as Phloem honours them. Unknown request fields are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import UNSET, Meta, Struct, UnsetType

from phloem.services.gateway.sampling import SamplingFields
from phloem.shared.protocol.session import FinishReason

# It is hashed with every block of the prompt.
CacheSalt: TypeAlias = Annotated[str, Meta(max_length=256)]

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]


class ContentPart(Struct, frozen=True):
    """Only `text` parts are served."""

    type: str
    text: str | None = None


class ChatMessage(Struct, frozen=True):
    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None  # Any: refused unless empty
    function_call: dict[str, Any] | None = None


class StreamOptions(Struct, frozen=True):
    """`include_usage`: a last chunk tells the usage; with `continuous_usage_stats` every chunk does."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationFields(SamplingFields, kw_only=True, frozen=True):
    """What chat and completions share."""

    model: str | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    cache_salt: CacheSalt | None = None


class ChatCompletionRequest(GenerationFields, kw_only=True, frozen=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool] | None = None


class CompletionRequest(GenerationFields, kw_only=True, frozen=True):
    """`prompt` is a text, a list of texts, token ids, or a list of those."""

    prompt: str | list[str | int | list[int]]


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PhloemField(Struct, frozen=True):
    """Phloem's own addition, on request: seconds since the request arrived, by event, of choice 0."""

    request_id: str
    timeline: dict[str, float]


class AssistantMessage(Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(Struct, frozen=True):
    index: int
    message: AssistantMessage
    finish_reason: FinishReason | None
    logprobs: None = None


class CompletionChoice(Struct, frozen=True):
    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: None = None


class ChatDelta(Struct, frozen=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True):
    index: int
    delta: ChatDelta
    finish_reason: FinishReason | None = None
    logprobs: None = None


class _Answer(Struct, kw_only=True, frozen=True):
    """`usage` is absent from chunks unless the request asked for it."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    phloem: PhloemField | UnsetType = UNSET


class ChatCompletion(_Answer, kw_only=True, frozen=True):
    choices: list[ChatChoice]
    object: Literal["chat.completion"] = "chat.completion"


class ChatCompletionChunk(_Answer, kw_only=True, frozen=True):
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class Completion(_Answer, kw_only=True, frozen=True):
    """Both a whole answer and a chunk of one."""

    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"

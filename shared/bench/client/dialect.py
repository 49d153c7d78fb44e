"""How each API is asked, and how its events are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from phloem.shared.bench.protocol import ApiName, TargetSpec
from phloem.shared.bench.session import PromptKind, join_pieces
from phloem.shared.errors import ConfigError

PATHS: dict[ApiName, str] = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "generate": "/generate",
}
_KINDS: dict[ApiName, tuple[PromptKind, ...]] = {
    "completions": ("tokens", "text"),
    "chat": ("messages",),
    "generate": ("tokens", "text"),
}


class Event(NamedTuple):
    """What one event of a stream says. `text` is new text; counts are cumulative, negative when not said."""

    text: str = ""
    has_tokens: bool = False  # it carried output, even if that is not text (a tool call)
    output_tokens: int = -1
    prompt_tokens: int = -1
    cached_tokens: int = -1
    finish_reason: str = ""
    token_ids: Sequence[int] = ()
    error: str = ""


class _CachedTokens(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = -1
    completion_tokens: int | None = None
    prompt_tokens_details: _CachedTokens | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw()


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _OpenAIChunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


class _MetaInfo(msgspec.Struct):
    prompt_tokens: int = -1
    completion_tokens: int = -1
    cached_tokens: int = -1
    finish_reason: msgspec.Raw = msgspec.Raw()


class _GenerateChunk(msgspec.Struct):
    text: str = ""
    meta_info: _MetaInfo | None = None
    output_ids: list[int] | None = None
    error: msgspec.Raw = msgspec.Raw()


class OpenAIReader:
    """Reads `/v1/completions` and `/v1/chat/completions`."""

    _decoder = msgspec.json.Decoder(_OpenAIChunk)

    def read(self, data: bytes) -> Event:
        """Raises `msgspec.DecodeError` for what is not such an event."""
        chunk = self._decoder.decode(data)
        if _is_set(chunk.error):
            return Event(error=error_text(bytes(chunk.error)))
        text, finish_reason, has_tokens = "", "", False
        token_ids: Sequence[int] = ()
        if chunk.choices:
            choice = chunk.choices[0]
            finish_reason = choice.finish_reason or ""
            text = choice.text or ""
            token_ids = choice.token_ids or ()
            if (delta := choice.delta) is not None:
                text = (delta.content or "") + (delta.reasoning_content or delta.reasoning or "")
                has_tokens = _is_set(delta.tool_calls)
        has_tokens = has_tokens or bool(text)
        usage = chunk.usage
        if usage is None:
            return Event(text, has_tokens, finish_reason=finish_reason, token_ids=token_ids)
        details = usage.prompt_tokens_details
        cached = details.cached_tokens if details is not None else None
        return Event(
            text,
            has_tokens,
            usage.completion_tokens if usage.completion_tokens is not None else -1,
            usage.prompt_tokens,
            -1 if cached is None else cached,
            finish_reason,
            token_ids,
        )


class GenerateReader:
    """Reads SGLang's `/generate`, whose events repeat all the text so far."""

    _decoder = msgspec.json.Decoder(_GenerateChunk)

    def __init__(self) -> None:
        self._num_chars = 0
        self._num_ids = 0

    def read(self, data: bytes) -> Event:
        """Raises `msgspec.DecodeError` for what is not such an event."""
        chunk = self._decoder.decode(data)
        if _is_set(chunk.error):
            return Event(error=error_text(bytes(chunk.error)))
        text, self._num_chars = chunk.text[self._num_chars :], max(self._num_chars, len(chunk.text))
        ids = chunk.output_ids or []
        new_ids, self._num_ids = ids[self._num_ids :], max(self._num_ids, len(ids))
        info = chunk.meta_info
        if info is None:
            return Event(text, bool(text), token_ids=new_ids)
        return Event(
            text,
            bool(text),
            info.completion_tokens,
            info.prompt_tokens,
            info.cached_tokens,
            _generate_finish(info.finish_reason),
            new_ids,
        )


def reader_for(api: ApiName) -> OpenAIReader | GenerateReader:
    """A reader for one response."""
    return GenerateReader() if api == "generate" else OpenAIReader()


class RequestWriter:
    """Makes the requests of one target; all but prompt and length is formatted once."""

    def __init__(self, spec: TargetSpec, authority: str, base_path: str) -> None:
        self._spec = spec
        path = base_path.removesuffix("/v1") + PATHS[spec.api]
        lines = [
            f"POST {path} HTTP/1.1",
            f"host: {authority}",
            "accept: text/event-stream",
            "content-type: application/json",
            *(f"{name}: {value}" for name, value in spec.headers),
        ]
        self._head = "\r\n".join(lines).encode() + b"\r\nx-request-id: %b\r\ncontent-length: %d\r\n\r\n"
        self._fixed = _fixed_members(spec)

    def request(self, request_id: str, kind: PromptKind, pieces: Sequence[bytes], max_tokens: int) -> bytes:
        """Head and body. Raises `ConfigError` when the API takes no such prompt."""
        if kind not in _KINDS[self._spec.api]:
            raise ConfigError(f"the {self._spec.api} API takes no {kind} prompt", param="api")
        body = self._body(kind, join_pieces(kind, pieces), max_tokens)
        return self._head % (request_id.encode(), len(body)) + body

    def _body(self, kind: PromptKind, prompt: bytes, max_tokens: int) -> bytes:
        if self._spec.api == "chat":
            return b'{"messages":[%b],"max_tokens":%d%b}' % (prompt, max_tokens, self._fixed)
        value = b"[%b]" % prompt if kind == "tokens" else b'"%b"' % prompt
        if self._spec.api == "completions":
            return b'{"prompt":%b,"max_tokens":%d%b}' % (value, max_tokens, self._fixed)
        name = b"input_ids" if kind == "tokens" else b"text"
        return b'{"%b":%b,"sampling_params":{"max_new_tokens":%d%b' % (name, value, max_tokens, self._fixed)


def _fixed_members(spec: TargetSpec) -> bytes:
    """The members that all requests share, and the closing braces."""
    sampling: dict[str, object] = {"temperature": spec.temperature}
    if spec.ignore_eos:
        sampling["ignore_eos"] = True
    extra = b"," + spec.extra_body if spec.extra_body else b""
    if spec.api == "generate":
        return b"," + _members(sampling) + b"}," + _members({"stream": True}) + extra + b"}"
    members = sampling | {"stream": True}
    if spec.model:
        members["model"] = spec.model
    if spec.ask_usage:
        options = {"include_usage": True}
        if spec.ask_chunk_usage:
            options["continuous_usage_stats"] = True
        members["stream_options"] = options
    return b"," + _members(members) + extra


def _members(values: dict[str, object]) -> bytes:
    return msgspec.json.encode(values)[1:-1]


def error_text(raw: bytes) -> str:
    """A message from OpenAI's error shape, or the raw text, at most 300 characters."""
    try:
        body = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        return raw.decode(errors="replace")[:300]
    if isinstance(body, dict) and isinstance(inner := body.get("error", body), dict):
        body = inner.get("message") or inner.get("detail") or body
    return (body if isinstance(body, str) else raw.decode(errors="replace"))[:300]


def _is_set(raw: msgspec.Raw) -> bool:
    return bytes(raw) not in (b"", b"null", b"[]")


def _generate_finish(raw: msgspec.Raw) -> str:
    """SGLang sends null, or an object with `type`."""
    if not _is_set(raw):
        return ""
    value = msgspec.json.decode(bytes(raw))
    return str(value.get("type", "")) if isinstance(value, dict) else str(value)

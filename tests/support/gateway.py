"""A gateway without a cluster: a tiny real tokenizer, a generator that follows a script, a real server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import httpx
from litestar.types import ASGIApp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from phloem.services.gateway.app import create_app
from phloem.services.gateway.config import GatewayConfig
from phloem.services.gateway.gateway import Gateway
from phloem.services.gateway.generation import ClusterModelInfo, GeneratedTokens, GenerationRequest
from phloem.services.gateway.http_server import bind, serve_http
from phloem.services.gateway.metrics import GatewayMetrics
from phloem.services.gateway.route_report import RouteReport
from phloem.services.gateway.served_model import ServedModel
from phloem.services.gateway.text.loading import load_prompt_encoder

MODEL = "tiny"
SECRET = b"secret"
CONTEXT_LENGTH = 256
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = 2  # <|im_end|>
REPLY = "Hello wörld 👋🏽, this is the end."
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Script: TypeAlias = Callable[[GenerationRequest], Sequence[GeneratedTokens | BaseException]]


def make_model_dir(path: Path, *, chat_template: str | None = CHATML) -> Path:
    """Writes a byte-level BPE tokenizer with a few merges, and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["the user and the assistant and the system say hello to the world\n\n this is the end."] * 20
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": chat_template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def encode(model_dir: Path, text: str) -> list[int]:
    """Plain token ids, control tokens on: what the reference would say."""
    ids: list[int] = (
        Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    )
    return ids


def reply_script(token_ids: Sequence[int], *, per_item: int = 1) -> Script:
    """Says `token_ids` and the end token, `per_item` at once, or stops at max_tokens."""

    def script(request: GenerationRequest) -> list[GeneratedTokens]:
        wanted = [*token_ids, END][: request.sampling.max_tokens]
        items = [wanted[start : start + per_item] for start in range(0, len(wanted), per_item)]
        reason = "stop" if len(wanted) == len(token_ids) + 1 else "length"
        last = GeneratedTokens(items[-1], finish_reason=reason)  # type: ignore[arg-type]
        return [GeneratedTokens(item) for item in items[:-1]] + [last]

    return script


class FakeGenerator:
    """A cluster that follows `script`. With a `gate`, each item but the first waits until it is set."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[GenerationRequest] = []
        self.closed: list[str] = []  # request ids, as their generators were closed before their end
        self.gate: asyncio.Event | None = None
        self.num_running = 0
        self.num_flushes = 0
        self.reports: dict[str, RouteReport] = {}
        self.info = ClusterModelInfo(
            model_id=MODEL, context_length=CONTEXT_LENGTH, num_prefill_workers=1, num_decode_workers=2
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedTokens, None]:
        self.requests.append(request)
        self.num_running += 1
        ended = False
        try:
            for index, item in enumerate(self.script(request)):
                if index and self.gate is not None:
                    await self.gate.wait()
                else:
                    await asyncio.sleep(0)
                if isinstance(item, BaseException):
                    ended = True
                    raise item
                ended = item.finish_reason is not None
                yield item
        finally:
            self.num_running -= 1
            if not ended:
                self.closed.append(request.request_id)

    async def flush_cache(self) -> int:
        self.num_flushes += 1
        return 3

    def model_info(self) -> ClusterModelInfo:
        return self.info

    def route_report(self, request_id: str) -> RouteReport | None:
        return self.reports.get(request_id)

    def ready(self) -> bool:
        return True


def make_gateway(model_dir: Path, generator: FakeGenerator, config: GatewayConfig | None = None) -> Gateway:
    """A gateway over `generator`; its encoder's threads end with the process."""
    return Gateway(
        config or GatewayConfig(),
        generator,
        load_prompt_encoder(model_dir, num_threads=1),
        ServedModel(
            name=MODEL, path="/models/tiny", context_length=CONTEXT_LENGTH, vocab_size=400, created=1
        ),
        GatewayMetrics(),
    )


@contextlib.asynccontextmanager
async def in_process(
    gateway: Gateway, app: ASGIApp | None = None, headers: dict[str, str] | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A client that calls the application without a socket; streams arrive whole. Making an `app` takes a
    while: tests that share a gateway share it."""
    transport = httpx.ASGITransport(app or create_app(gateway, SECRET, on_loopback=True))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
        yield client


@contextlib.asynccontextmanager
async def over_http(gateway: Gateway) -> AsyncIterator[str]:
    """The gateway on a free port of the loopback; yields its URL."""
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    stop = asyncio.Event()
    serving = asyncio.create_task(
        serve_http(create_app(gateway, SECRET, on_loopback=True), listener, stop, drain_timeout_s=5.0)
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop.set()
        await serving


def events_of(body: str) -> list[str]:
    """The data of each server-sent event."""
    return [event.removeprefix("data: ") for event in body.split("\n\n") if event]

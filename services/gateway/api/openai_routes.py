"""OpenAI's routes: chat completions, completions, models."""

from __future__ import annotations

from litestar import get, post
from litestar.openapi import ResponseSpec
from litestar.types import ASGIApp
from msgspec import Struct

from phloem.services.gateway.api.access import call_of
from phloem.services.gateway.api.answer import Job, answering
from phloem.services.gateway.api.errors import HttpRequest
from phloem.services.gateway.api.json_body import decode_json
from phloem.services.gateway.api.openai_answers import ChatDialect, CompletionDialect, usage_wish
from phloem.services.gateway.api.openai_types import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    GenerationFields,
)
from phloem.services.gateway.api.operations import body_of, gateway_of, takes_body
from phloem.services.gateway.api.prompts import chat_messages, completion_prompts, encoded, template_variables
from phloem.services.gateway.api.refusals import CHAT_REFUSALS, COMPLETION_REFUSALS, refuse_unsupported
from phloem.services.gateway.gateway import Gateway
from phloem.services.gateway.sampling import SamplingPlan, plan_sampling


class ModelCard(Struct, frozen=True, kw_only=True):
    id: str
    created: int
    root: str
    max_model_len: int
    object: str = "model"
    owned_by: str = "phloem"


class ModelList(Struct, frozen=True):
    data: list[ModelCard]
    object: str = "list"


@post(
    "/v1/chat/completions",
    status_code=200,
    operation_class=takes_body(ChatCompletionRequest),
    responses={200: ResponseSpec(ChatCompletion, description="The answer, or a stream of chunks")},
    summary="Chat completion",
)
async def chat_completions(request: HttpRequest) -> ASGIApp:
    """Answers a conversation."""
    gateway, call = gateway_of(request), call_of(request.scope)
    data = await body_of(request)
    body: ChatCompletionRequest = decode_json(data, ChatCompletionRequest)
    refuse_unsupported(data, CHAT_REFUSALS)
    gateway.model.check_name(body.model)
    asked, param = body.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        asked, param = body.max_tokens, "max_tokens"
    sampling = _sampling(gateway, body, asked, param)
    messages = chat_messages(body.messages, gateway.config.max_messages)
    variables = template_variables(body.chat_template_kwargs, gateway.config.chat_template_kwargs)

    async def encode() -> list[list[int]]:
        prompt = await gateway.encoder.encode_chat(
            messages,
            context_length=gateway.context_length,
            add_generation_prompt=body.add_generation_prompt is not False,
            extra=variables,
        )
        return [prompt]

    job = Job(
        sampling=sampling,
        num_prompts=1,
        encode=encode,
        param="messages",
        cache_salt=body.cache_salt,
        continues_text=False,
        dialect=ChatDialect(call, gateway.model.name, usage=usage_wish(body)),
        stream=bool(body.stream),
    )
    return answering(gateway, call, job)


@post(
    "/v1/completions",
    status_code=200,
    operation_class=takes_body(CompletionRequest),
    responses={200: ResponseSpec(Completion, description="The answer, or a stream of chunks")},
    summary="Completion",
)
async def completions(request: HttpRequest) -> ASGIApp:
    """Goes on where a text or token ids stop."""
    gateway, call = gateway_of(request), call_of(request.scope)
    data = await body_of(request)
    body: CompletionRequest = decode_json(data, CompletionRequest)
    refuse_unsupported(data, COMPLETION_REFUSALS)
    gateway.model.check_name(body.model)
    sampling = _sampling(gateway, body, body.max_tokens, "max_tokens")
    prompts = completion_prompts(body.prompt, "prompt", gateway.config.max_batch_prompts)

    job = Job(
        sampling=sampling,
        num_prompts=len(prompts),
        encode=lambda: encoded(gateway, prompts, "prompt"),
        param="prompt",
        cache_salt=body.cache_salt,
        continues_text=True,
        dialect=CompletionDialect(call, gateway.model.name, usage=usage_wish(body)),
        stream=bool(body.stream),
    )
    return answering(gateway, call, job)


@get("/v1/models", summary="The models served")
async def list_models(request: HttpRequest) -> ModelList:
    return ModelList([_card(gateway_of(request))])


@get("/v1/models/{model_id:path}", summary="One model")
async def get_model(request: HttpRequest) -> ModelCard:
    gateway = gateway_of(request)
    gateway.model.check_name(str(request.path_params["model_id"]).lstrip("/"))
    return _card(gateway)


def _sampling(gateway: Gateway, body: GenerationFields, asked: int | None, param: str) -> SamplingPlan:
    return plan_sampling(
        body,
        max_tokens=asked,
        max_tokens_param=param,
        config=gateway.config,
        check_tokens=gateway.check_tokens,
    )


def _card(gateway: Gateway) -> ModelCard:
    model = gateway.model
    return ModelCard(
        id=model.name, created=model.created, root=model.path, max_model_len=gateway.context_length
    )
